"""PgBouncer in front of a real PostgreSQL, as a private process."""

import os
import pwd
import shutil
import signal
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from app.demo.embedded_postgres import dying_with_parent
from tests.harness.installed import Killable, postgres_answers
from tests.harness.ports import free_port
from tests.harness.processes import ProcessTree, start_process, tail
from tests.harness.wait import AMPLE_SECONDS, wait_until

# The defaults, except for what a private one needs. So it accepts only the default start-up parameters.
CONFIGURATION = """\
[databases]
* = host={host} port={port} user='{user}' password='{password}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = session
"""


class PgBouncer(Killable):
    """A PgBouncer below `directory` that lends sessions of the server of `url` (`pool_mode = session`)."""

    def __init__(self, directory: Path, url: str) -> None:
        self._upstream = urlsplit(url)
        self._home = directory.resolve() / "pgbouncer"
        self._log = self._home / "log"
        self._port = free_port()
        self.url = self._upstream._replace(netloc=f"anybody@127.0.0.1:{self._port}").geturl()
        self._tree = ProcessTree()

    async def __aenter__(self) -> Self:
        """Start PgBouncer; return when it accepts sessions."""
        self._home.mkdir()
        self._home.chmod(0o711)
        configuration = self._home / "pgbouncer.ini"
        configuration.write_text(self._configuration())
        command = [*dying_with_parent(signal.SIGKILL), find_pgbouncer(), str(configuration)]
        if os.geteuid() == 0:  # which it refuses
            command = [*as_the_owner_of(configuration, pwd.getpwnam("nobody")), *command]
        self._tree = ProcessTree(start_process(command, self._home, os.environ, self._log))
        try:
            await wait_until(lambda: postgres_answers(self.url), AMPLE_SECONDS, "a session from PgBouncer")
        except BaseException as error:
            await self.kill()
            error.add_note(tail(self._log))
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    def _configuration(self) -> str:
        return CONFIGURATION.format(
            host=self._upstream.hostname,
            port=self._upstream.port,
            user=_quoted(self._upstream.username),
            password=_quoted(self._upstream.password),
            listen_port=self._port,
        )


def _quoted(text: str | None) -> str:
    return unquote(text or "").replace("'", "''")


def find_pgbouncer() -> str:
    """Return the path of the program. FileNotFoundError says what to install."""
    if path := shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"):
        return path
    raise FileNotFoundError("PgBouncer is not installed: run scripts/install-servers, or `apt-get install pgbouncer`")


def as_the_owner_of(path: Path, user: pwd.struct_passwd) -> list[str]:
    """Give a file to a user; return the command prefix for a program that runs as this user."""
    os.chown(path, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]

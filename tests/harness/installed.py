"""Installed servers as private processes that a test may kill, freeze and start again on the same data and port."""

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import asyncpg

from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries
from tests.harness.clocks import remove_shared_memory
from tests.harness.ports import free_port
from tests.harness.processes import ProcessTree, start_process, tail
from tests.harness.wait import wait_until

# The page cache outlives a killed process: nothing is lost without fsync. synchronous_commit stays as it is. So does
# full_page_writes: a kill may leave a page half written, and only the WAL's copy of the page repairs that.
# WAL is small, because it may be in memory. Statistics and dead rows change when a test says so, not when the
# autovacuum comes by: it would change plans, and its own snapshot keeps dead rows from a VACUUM. Shared memory is in
# files of the data directory, which goes with the run: a server that is killed leaves other kinds behind.
POSTGRES_SETTINGS = {
    "autovacuum": "off",
    "dynamic_shared_memory_type": "mmap",
    "fsync": "off",
    "max_connections": "300",
    "max_wal_size": "256MB",
}
RABBITMQ_SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's wrapper of it refuses other users
RABBITMQ_CONTROL = RABBITMQ_SCRIPT.with_name("rabbitmqctl")
REDIS_START_SECONDS = 90.0
RIGHTS = {
    "orders": {"configure": ".*", "write": ".*", "read": ".*"},
    "limited": {"configure": "^$", "write": ".*", "read": ".*"},
    "documented": {  # in docs/operations.md
        "configure": r"^orders\.(events|dlx|saga(\.dlq(\.pass)?)?)$",
        "write": r"^(orders\.(events|dlx|saga(\.dlq)?)|amq\.default)$",
        "read": r"^orders\.(events|dlx|saga(\.dlq)?)$",
    },
}
# A process that has just ended needs no limit.
LIMIT_FILES = 'size=$1; shift; for pid; do prlimit --pid "$pid" --fsize="$size": || ! kill -0 "$pid" || exit 1; done'
RABBITMQ_START_SECONDS = 180.0  # about 5 s of processor time, which two workers may have to share
# From 4.2 on, declarations are in Khepri, which writes them to disk before it answers.
SYNC_DECLARATIONS = """
case lists:keymember(mnesia, 1, application:which_applications()) of
    true -> ok = mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()];
    false -> ok
end.
"""


class Killable:
    """A server whose processes a test can kill and freeze."""

    _tree: ProcessTree

    async def kill(self) -> None:
        """SIGKILL every process of it, and wait for them."""
        tree, self._tree = self._tree, ProcessTree()
        await tree.kill()

    def freeze(self) -> None:
        """Stop every process of it (SIGSTOP)."""
        self._tree.freeze()

    def thaw(self) -> None:
        """Continue them (SIGCONT)."""
        self._tree.thaw()


class Postgres(Killable, EmbeddedPostgres):
    """A private PostgreSQL below `directory`. `env` is added to its environment."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, str] = POSTGRES_SETTINGS,
        env: Mapping[str, str] | None = None,
    ) -> None:
        binaries = find_binaries(os.environ.get("ORDERS_PG_BIN"))
        super().__init__(directory, binaries, port=free_port(), settings=settings, env=env)
        self._tree = ProcessTree()

    async def start(self) -> None:
        """Start it, or start it again."""
        await super().start()
        self._tree = ProcessTree(self.process)

    async def stop(self) -> None:
        """Shut it down cleanly."""
        self._tree.thaw()
        await super().stop()

    async def kill(self) -> None:
        """SIGKILL every process of it, and wait for them."""
        leaders = self._tree.leaders
        await super().kill()
        await super().stop()
        for leader in leaders:
            remove_shared_memory(leader.pid)

    def limit_files(self, size: int) -> None:
        """Let no file grow beyond `size` bytes, until it is started again."""
        # By the user of the server: not even root may limit another user's processes everywhere.
        command: list[str | Path] = ["/bin/sh", "-c", LIMIT_FILES, "sh", str(size), *map(str, self._tree.pids())]
        status, output = self._choose_account().run(command, self.home)
        if status:
            raise RuntimeError(f"prlimit failed: {output}")


class Redis(Killable):
    """A private Redis below `directory`, which keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        self.home = directory.resolve() / "redis"
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._tree = ProcessTree()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Return when it accepts connections; start it, or start it again, empty."""
        binary = shutil.which("redis-server")
        if binary is None:
            remedy = "run scripts/install-servers, or `apt-get install redis-server`, or set TEST_REDIS_URL"
            raise FileNotFoundError(f"Redis is not installed: {remedy}")
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--dir", str(self.home)]
        self._tree = ProcessTree(start_process([binary, *options], self.home, os.environ, self.home / "log"))
        try:
            await wait_until(lambda: redis_answers(self.port), REDIS_START_SECONDS, "PONG from Redis")
        except BaseException as error:
            await self.kill()
            error.add_note(tail(self.home / "log"))
            raise


class RabbitMQ(Killable):
    """A private RabbitMQ below `directory`, with its own Erlang cookie and port mapper, and these vhosts.

    `env` is added to its environment.
    """

    start_seconds = RABBITMQ_START_SECONDS

    def __init__(
        self,
        directory: Path,
        vhosts: Sequence[str] = ("w0",),
        name: str = "orders",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.home = directory.resolve() / ("rabbitmq" if name == "orders" else f"rabbitmq-{name}")
        self.log = self.home / "output"
        self.node = f"{name}@localhost"
        self.port, self._distribution_port, self._epmd_port = free_port(), free_port(), free_port()
        self._vhosts = vhosts
        self._env = dict(env or {})
        self._tree = ProcessTree()

    def url(self, vhost: str = "w0") -> str:
        """Return the URL of one vhost, with user and password."""
        return rabbitmq_url(self.port, vhost)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Return when it accepts AMQP connections; start it, or start it again."""
        self._configure()
        self._tree = ProcessTree(
            *(start_process(c, self.home, self._environment() | self._env, self.log) for c in self._commands())
        )
        try:
            await wait_until(self._accepts_connections, self.start_seconds, "connection to RabbitMQ")
        except BaseException as error:
            await self.kill()
            error.add_note(tail(self.log))
            raise

    @property
    def pid(self) -> int:
        """The process of the server."""
        return self._tree.leaders[-1].pid

    def save(self) -> None:
        """Copy its data, for `restore`. It must not run."""
        shutil.copytree(self.home / "mnesia", self.home / "saved", dirs_exist_ok=True)

    def restore(self) -> None:
        """Return to the data of the last `save`. It must not run."""
        shutil.rmtree(self.home / "mnesia")
        (self.home / "saved").rename(self.home / "mnesia")

    async def sync(self) -> None:
        """Write all declarations to disk now; otherwise RabbitMQ does so within about a second.

        If it is killed earlier, it may lose a queue, or restore a quorum queue without a leader and its messages.
        """
        await self.control("eval", SYNC_DECLARATIONS)

    async def control(self, *args: str) -> None:
        """Run `rabbitmqctl`."""
        command = [str(RABBITMQ_CONTROL), *args]
        control = await asyncio.create_subprocess_exec(
            *command, cwd=self.home, env=self._environment(), stdout=asyncio.subprocess.DEVNULL
        )
        if await control.wait():
            raise RuntimeError(f"rabbitmqctl ended with {control.returncode}")

    def _commands(self) -> list[list[str]]:
        return [port_mapper(self._epmd_port), [str(RABBITMQ_SCRIPT)]]

    def _configure(self) -> None:
        if not RABBITMQ_SCRIPT.exists():
            remedy = "run scripts/install-servers, or `apt-get install rabbitmq-server`, or set TEST_RABBITMQ_URL"
            raise FileNotFoundError(f"RabbitMQ is not installed: {remedy}")
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.home / "definitions.json").write_text(json.dumps(rabbitmq_definitions(self._vhosts)))
        (self.home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nload_definitions = {self.home}/definitions.json\n"
        )

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),  # Erlang keeps its cookie there
            "ERL_EPMD_PORT": str(self._epmd_port),
            "detached": "1",  # makes the script become the server instead of its parent
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.home / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.home / "mnesia"),
            "RABBITMQ_PID_FILE": str(self.home / "pid"),
            "RABBITMQ_LOG_BASE": str(self.home / "logs"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    async def _accepts_connections(self) -> bool:
        if any(process.poll() is not None for process in self._tree.leaders):
            raise RuntimeError("RabbitMQ ended while starting")
        return await rabbitmq_answers(self.port)


def port_mapper(port: int) -> list[str]:
    """Return the command of an epmd, by which the nodes of a RabbitMQ find each other.

    It runs in the foreground, as our child: the daemon that Erlang would start by itself outlives the run.
    """
    return ["epmd", "-port", str(port), "-address", "127.0.0.1"]


def rabbitmq_url(port: int, vhost: str) -> str:
    """Return the URL of one vhost for the user of `rabbitmq_definitions`."""
    return f"amqp://orders:orders@127.0.0.1:{port}/{vhost}"


def rabbitmq_definitions(vhosts: Sequence[str]) -> Mapping[str, Any]:
    """Return the initial objects of a RabbitMQ for tests: one user per entry of `RIGHTS`, with its name as password."""
    return {
        "users": [
            {"name": user, "password": user, "tags": "administrator" if user == "orders" else ""} for user in RIGHTS
        ],
        "vhosts": [{"name": vhost} for vhost in vhosts],
        "permissions": [{"user": user, "vhost": vhost, **RIGHTS[user]} for user in RIGHTS for vhost in vhosts],
    }


async def rabbitmq_answers(port: int) -> bool:
    """Return whether the server accepts AMQP connections."""
    # The first byte of the frame Connection.Start; nothing comes while the server closes connections.
    return bool(await _answer(port, b"AMQP\x00\x00\x09\x01", 1))


async def redis_answers(port: int) -> bool:
    """Return whether a Redis without a password answers."""
    return await _answer(port, b"PING\r\n", 7) == b"+PONG\r\n"


async def postgres_answers(url: str) -> bool:
    """Return whether Postgres accepts statements."""
    try:
        conn = await asyncpg.connect(url)
    except (OSError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError):
        return False
    await conn.close()
    return True


async def _answer(port: int, question: bytes, length: int) -> bytes:
    """Return up to `length` bytes; fewer if the connection is refused, or closed early, as by a proxy."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return b""
    try:
        writer.write(question)
        return await reader.readexactly(length)
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""
    finally:
        writer.close()

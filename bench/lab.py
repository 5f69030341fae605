"""Start the servers that all contenders share, and the contenders, as private processes on 127.0.0.1.

Postgres has its defaults (fsync is on, statistics and autovacuum too) and `pg_stat_statements`. Each contender has a
database and a vhost of its own. Every process ends with the run.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from bench import peers
from tests.harness import installed
from tests.harness.ports import VARIABLE, free_port
from tests.harness.processes import REPOSITORY, ProcessTree, start_process, tail
from tests.harness.wait import wait_until

POSTGRES_SETTINGS = {
    "max_connections": "400",
    "shared_buffers": "512MB",
    "shared_preload_libraries": "pg_stat_statements",
    "max_wal_size": "4GB",
    "dynamic_shared_memory_type": "mmap",
}
VHOSTS = [f"v{number}" for number in range(40)]
PUBLISHING = {"orm", "core", "hand_made", "aio_pika_only"}
START_SECONDS = 300.0
NOWHERE = "http://127.0.0.1:9"
NO_BROKER = "amqp://127.0.0.1:9"  # of a process that has only the role api: it does not connect
PATIENCE = {  # on a busy machine a window is slow, and does not fail; no measure depends on them
    "ORDERS_DATABASE_POOL_WAIT_SECONDS": "60",
    "ORDERS_DATABASE_STATEMENT_SECONDS": "60",
    "ORDERS_REDIS_TIMEOUT_SECONDS": "10",
}
ROLES = ("api", "relay", "consumer", "janitor")


@contextlib.contextmanager
def directory_of_a_run() -> Iterator[Path]:
    """Make a directory for the servers of a run, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="orders-bench-") as place:
        Path(place).chmod(0o711)  # Postgres may run as another user
        os.environ[VARIABLE] = place
        yield Path(place)


@dataclass
class Contender:
    """A running program. `url` names its database, `port` its HTTP port; each is empty if it has none."""

    name: str
    tree: ProcessTree
    port: int
    url: str

    @property
    def pid(self) -> int:
        """The process, whose descendants belong to it."""
        return self.tree.leaders[0].pid


@dataclass(frozen=True)
class Deployment:
    """What the processes of a service share. `url` names its database."""

    name: str
    url: str
    env: Mapping[str, str]


class Lab:
    """The servers, and a place for the programs that a row starts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.postgres = installed.Postgres(directory, POSTGRES_SETTINGS)
        self.redis = installed.Redis(directory)
        self.rabbitmq = installed.RabbitMQ(directory, VHOSTS)
        self._stack = contextlib.AsyncExitStack()
        self._statistics: asyncpg.Connection | None = None
        self._databases = 0
        self._vhosts = list(VHOSTS)

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.gather(*(stack.enter_async_context(server) for server in (self.postgres, self.redis)))
            self._statistics = await asyncpg.connect(self.postgres.url)
            stack.push_async_callback(self._statistics.close)
            await self._statistics.execute("CREATE EXTENSION pg_stat_statements")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def statistics(self) -> asyncpg.Connection:
        """A connection to a database that no contender has."""
        if self._statistics is None:
            raise RuntimeError("bug: the lab is not open")
        return self._statistics

    async def broker_url(self) -> str:
        """Return the URL of an unused vhost. The broker takes long to start, so it does at the first call."""
        if len(self._vhosts) == len(VHOSTS):
            await self._stack.enter_async_context(self.rabbitmq)
        return self.rabbitmq.url(self._vhosts.pop())

    async def database(self, name: str) -> str:
        """Return the URL of a new database: a row must not work off what an earlier one left."""
        self._databases += 1
        database = f"{name}_{self._databases}"
        await self.statistics.execute(f'CREATE DATABASE "{database}"')
        return urlunsplit(urlsplit(self.postgres.url)._replace(path=f"/{database}"))

    @contextlib.asynccontextmanager
    async def service(
        self, roles: Sequence[str] = ROLES, name: str = "service", partners_url: str = NOWHERE, **env: str
    ) -> AsyncIterator[Contender]:
        """Run the service with these roles in one process, on a new database and vhost, until the block ends."""
        deployment = await self.deployment(name, partners_url, has_broker=tuple(roles) != ("api",))
        async with self.process(deployment, roles, **env) as contender:
            yield contender

    async def deployment(self, name: str, partners_url: str = NOWHERE, *, has_broker: bool = True) -> Deployment:
        """Migrate a new database for processes of the service, which share it, and a new vhost."""
        url = await self.database(name)
        env = {
            **PATIENCE,
            "ORDERS_DATABASE_URL": url,
            "ORDERS_REDIS_URL": self.redis.url,
            "ORDERS_RABBITMQ_URL": await self.broker_url() if has_broker else NO_BROKER,
            **dict.fromkeys(("ORDERS_INVENTORY_URL", "ORDERS_PAYMENT_URL", "ORDERS_SHIPPING_URL"), partners_url),
        }
        await self._migrate(env)
        return Deployment(name, url, env)

    @contextlib.asynccontextmanager
    async def process(
        self, deployment: Deployment, roles: Sequence[str] = ROLES, **env: str
    ) -> AsyncIterator[Contender]:
        """Run a process of the service until the block ends."""
        found = {**deployment.env, "ORDERS_ROLES": ",".join(roles), **env}
        async with self.program(deployment.name, ["-m", "app", "serve"], found, url=deployment.url) as contender:
            yield contender

    async def _migrate(self, env: Mapping[str, str]) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "migrate", cwd=REPOSITORY, env={**_inherited(), **env}
        )
        if await process.wait():
            raise RuntimeError("`orders migrate` failed")

    @contextlib.asynccontextmanager
    async def floor(self, name: str, **env: str) -> AsyncIterator[Contender]:
        """Run `bench.floors.{name}` on a database and a vhost of its own, until the block ends."""
        url = await self.database(name)
        broker = {"RABBITMQ_URL": await self.broker_url()} if name in PUBLISHING and env.get("ROLES") != "api" else {}
        found = {"DATABASE_URL": url, **broker, **env}
        async with self.program(name, ["-m", f"bench.floors.{name}"], found, url=url) as contender:
            yield contender

    @contextlib.asynccontextmanager
    async def peer(self, name: str, **env: str) -> AsyncIterator[Contender]:
        """Run `bench.peers.{name}` in its own environment, on a database of its own, until the block ends."""
        url, python = await self.database(name), await peers.python(name)
        found = {"DATABASE_URL": url, "REDIS_URL": self.redis.url, **env}
        async with self.program(name, ["-m", f"bench.peers.{name}"], found, url=url, python=python) as contender:
            yield contender

    @contextlib.asynccontextmanager
    async def program(
        self, name: str, args: Sequence[str], env: Mapping[str, str], *, url: str = "", python: str = sys.executable
    ) -> AsyncIterator[Contender]:
        """Run a Python program that listens on the port in PORT (and ORDERS_PORT), until the block ends."""
        port, log = free_port(), self.directory / f"{name}.log"
        ports = {"PORT": str(port), "ORDERS_PORT": str(port)}
        tree = ProcessTree(start_process([python, *args], REPOSITORY, {**_inherited(), **ports, **env}, log))
        contender = Contender(name, tree, port, url)
        try:
            await wait_until(lambda: _listens(contender), START_SECONDS, f"port of {name}")
            yield contender
        except Exception as error:
            error.add_note(tail(log))
            raise
        finally:
            await tree.kill()


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}


async def _listens(contender: Contender) -> bool:
    leader = contender.tree.leaders[0]
    if leader.poll() is not None:
        raise RuntimeError(f"{contender.name} ended while starting")
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", contender.port)
    except ConnectionError:
        return False
    writer.close()
    return True

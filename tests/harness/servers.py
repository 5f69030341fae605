"""Servers of a test's own, or of the whole run: containers where there is an engine for them, else installed programs.

Both kinds have one interface and can be killed, frozen and started again, on the same data and port. Which kind it is
is decided once in a run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from tests.harness import containers, installed
from tests.harness.run import Run


class Server(Protocol):
    """A server that a test may do anything to. Leaving its context ends it; its data stays until the run ends."""

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def start(self) -> None:
        """Return when it serves; start it, or start it again."""

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""

    def freeze(self) -> None:
        """Stop every process of it where it is."""

    def thaw(self) -> None:
        """Let them go on."""


class Addressed(Server, Protocol):
    """A server with one address."""

    @property
    def url(self) -> str:
        """With user and password, where it has any."""


class Broker(Server, Protocol):
    """RabbitMQ."""

    def url(self, vhost: str = "w0") -> str:
        """Return the URL of one vhost, with user and password."""

    async def sync(self) -> None:
        """Have the declarations so far written to disk; see `installed.RabbitMQ.sync`."""


def postgres(directory: Path) -> Addressed:
    """Return a private PostgreSQL, not yet started."""
    run = Run.current()
    return containers.Postgres(run.directory) if run.has_containers else installed.Postgres(directory)


def redis(directory: Path) -> Addressed:
    """Return a private Redis, not yet started, which keeps nothing on disk."""
    run = Run.current()
    return containers.Redis(run.directory) if run.has_containers else installed.Redis(directory)


def rabbitmq(directory: Path, vhosts: Sequence[str] = ("w0",)) -> Broker:
    """Return a private RabbitMQ, not yet started, with these vhosts."""
    run = Run.current()
    return containers.RabbitMQ(run.directory, vhosts) if run.has_containers else installed.RabbitMQ(directory, vhosts)

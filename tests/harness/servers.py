"""Servers for one test or a whole run: in containers if there is an engine for them, else installed programs.

Both kinds have one interface, and can be killed, frozen and restarted on the same data and port. The kind is chosen
once per run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from tests.harness import containers, installed
from tests.harness.run import Run


class Server(Protocol):
    """A server that a test may kill and freeze. Leaving its context stops it; its data stays until the run ends."""

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 on which it listens."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def start(self) -> None:
        """Start or restart it; return when it accepts requests."""

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""

    def freeze(self) -> None:
        """Stop every process of it."""

    def thaw(self) -> None:
        """Continue them."""


class Addressed(Server, Protocol):
    """A server with one address."""

    @property
    def url(self) -> str:
        """The URL, with user and password if it has any."""


class Broker(Server, Protocol):
    """RabbitMQ."""

    def url(self, vhost: str = "w0") -> str:
        """Return the URL of one vhost, with user and password."""

    async def sync(self) -> None:
        """Write all declarations to disk now; see `installed.RabbitMQ.sync`."""


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

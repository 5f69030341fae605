"""A connection to RabbitMQ that survives undecodable messages, and that can be reset.

Both use aiormq's transport hook. Everything read passes through `undecodable`. A reset discards what is buffered;
aiormq's `close` would send it first, which takes long over a slow link, and meanwhile another relay may claim the same
messages.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any, cast

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelPreconditionFailed
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import ChannelAccessRefused
from yarl import URL

from app.errors import BrokerUnavailable
from app.messaging.rabbitmq.undecodable import FrameReader

log = structlog.get_logger(__name__)

CONNECT_SECONDS = 5
SETUP_SECONDS = 10  # a queue without a leader does not answer; declaring it later may work
HEARTBEAT_SECONDS = 15  # the connection to a frozen peer ends after about twice this

ACCESS = re.compile(r"access to (\w+) '([^']*)'")
INEQUIVALENT = re.compile(r"inequivalent arg '([^']*)' for (\w+) '([^']*)'")
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: the kernel drops its buffer and sends a RST


class _Transports(TransportFactory):
    """Opens transports as aiormq does, makes frames decodable, and keeps the last transport."""

    def __init__(self) -> None:
        self.last: asyncio.WriteTransport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await factory.create(url, **kwargs)
        self.last = writer.transport
        return cast("asyncio.StreamReader", FrameReader(reader)), writer


class AmqpConnection(aio_pika.Connection):
    """An aio-pika connection over one of `_Transports`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transports = self.kwargs["transport_factory"] = _Transports()

    def reset(self) -> None:
        """End the connection at once with a TCP RST. Call `close` afterwards, to end aiormq's tasks."""
        transport = self._transports.last
        if transport is not None and not transport.is_closing():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            transport.abort()


class ConfirmsLate(TimeoutError):
    """The connection is open, but confirms did not arrive in time."""


async def connect(url: str, name: str) -> AmqpConnection:
    """Connect once. Raises BrokerUnavailable."""
    try:
        return await aio_pika.connect(
            url,
            timeout=CONNECT_SECONDS,
            heartbeat=HEARTBEAT_SECONDS,
            client_properties={"connection_name": name},
            connection_class=AmqpConnection,
        )
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        raise unavailable(error) from error


def unavailable(error: BaseException) -> BrokerUnavailable:
    """Convert an error of aio-pika to BrokerUnavailable."""
    return BrokerUnavailable(f"rabbitmq: {type(error).__name__}: {error}".strip(": "), _refusal(error))


def _refusal(error: BaseException) -> str | None:
    """Describe the problem for readiness, which anyone may read: without the broker's user and vhost."""
    match error:
        case ConfirmsLate():
            return "the last batch was not confirmed in time"
        case ChannelAccessRefused() if found := ACCESS.search(str(error)):
            return "the broker refuses access to {} {}: a right is missing".format(*found.groups())
        case ChannelPreconditionFailed() if found := INEQUIVALENT.search(str(error)):
            return "{1} {2} exists with another {0}".format(*found.groups())
    return None


async def wait_until_unblocked(connection: AbstractConnection) -> None:
    """Wait until the broker accepts messages on this connection. `connection.blocked` announces that it does not."""
    if connection.transport is not None:
        await connection.transport.connection.ready()


async def is_blocked(connection: AbstractConnection | None) -> bool:
    """Return whether the broker blocks publishing on this connection."""
    if connection is None or connection.transport is None or connection.transport.connection.is_closed:
        return False
    try:
        async with asyncio.timeout(0):  # an unblocked connection needs no time
            await wait_until_unblocked(connection)
    except TimeoutError:
        return True
    return False


async def close(connection: AbstractConnection | None) -> None:
    """Close within a second, because the other side may be dead or frozen."""
    if connection is None:
        return
    try:
        async with asyncio.timeout(1):
            await connection.close()
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        log.info("rabbitmq.closed_hard", error=str(error))


@contextlib.contextmanager
def broker_errors() -> Iterator[None]:
    """Convert errors of the connection, and refusals of messages, to BrokerUnavailable."""
    try:
        yield
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        raise unavailable(error) from error

"""A connection to RabbitMQ that can be reset: nothing more leaves it, not even what it had buffered.

aiormq's `close` sends its buffers first. Over a slow link that takes long, and meanwhile another relay may have claimed
the messages in them.
"""

import asyncio
import socket
import struct
from typing import Any

import aio_pika
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from yarl import URL

RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time; the kernel drops its buffer and sends a RST


class _Sockets(TransportFactory):
    """Opens sockets as aiormq does, and keeps the last one."""

    def __init__(self) -> None:
        self.last: asyncio.WriteTransport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await factory.create(url, **kwargs)
        self.last = writer.transport
        return reader, writer


class ResettableConnection(aio_pika.Connection):
    """An aio-pika connection that keeps hold of its socket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sockets = self.kwargs["transport_factory"] = _Sockets()

    def reset(self) -> None:
        """End the connection at once with a TCP RST. `close` it afterwards, to end aiormq's tasks."""
        transport = self._sockets.last
        if transport is not None and not transport.is_closing():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            transport.abort()

"""A connection to RabbitMQ that no message can end, and that can be reset.

Both use aiormq's hook for transports. What is read passes through `undecodable`. A reset leaves nothing to be sent, not
even what was buffered: aiormq's `close` sends its buffers first, which takes long over a slow link, and meanwhile
another relay may have claimed the messages in them.
"""

import asyncio
import socket
import struct
from typing import Any, cast

import aio_pika
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from yarl import URL

from app.messaging.rabbitmq.undecodable import FrameReader

RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time; the kernel drops its buffer and sends a RST


class _Transports(TransportFactory):
    """Opens transports as aiormq does, reads tolerantly, and keeps the last transport."""

    def __init__(self) -> None:
        self.last: asyncio.WriteTransport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await factory.create(url, **kwargs)
        self.last = writer.transport
        return cast("asyncio.StreamReader", FrameReader(reader)), writer


class AmqpConnection(aio_pika.Connection):
    """An aio-pika connection over a transport of ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transports = self.kwargs["transport_factory"] = _Transports()

    def reset(self) -> None:
        """End the connection at once with a TCP RST. `close` it afterwards, to end aiormq's tasks."""
        transport = self._transports.last
        if transport is not None and not transport.is_closing():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            transport.abort()

"""What HTTP has no word for: a connection reset, or held in silence and then closed, without an answer.

ASGI hides the socket, so uvicorn is given a protocol of its own (`http_protocol`) that puts the connection
into each request's state. It also tells silent and slow answers when the server stops, so that they never
hold it up.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

RESET_INSTEAD_OF_FIN = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds
SILENCE_SECONDS = 60.0


class ClientConnection:
    """One client's connection, and the news that the server stops."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.stopping = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Wait, but no longer than the server runs."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def close(self, *, reset: bool) -> None:
        """End the connection at once: by TCP reset, or in the ordinary way."""
        if reset and not self._transport.is_closing():  # the client may have gone first
            linger = (socket.SOL_SOCKET, socket.SO_LINGER, RESET_INSTEAD_OF_FIN)
            self._transport.get_extra_info("socket").setsockopt(*linger)
        self._transport.abort()


class ConnectionProtocol(HttpToolsProtocol):
    """uvicorn's own protocol; `scope["state"]["connection"]` is the connection that a request came on."""

    def connection_made(self, transport: Any) -> None:
        """Offer the connection to its requests."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": ClientConnection(transport)}

    def shutdown(self) -> None:
        """Let go of what is waiting, then end as uvicorn does."""
        self.app_state["connection"].stopping.set()
        super().shutdown()


http_protocol = ConnectionProtocol
"""What `uvicorn.Config(http=...)` needs for the sandbox."""


class NoAnswer(Response):
    """Holds the connection in silence for a while, as long as client and server stay, then ends it."""

    def __init__(self, seconds: float, *, reset: bool) -> None:
        super().__init__()
        self._seconds = seconds
        self._reset = reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - says nothing
        """Take the place of an answer."""
        connection: ClientConnection = scope["state"]["connection"]
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        stopping = asyncio.create_task(connection.stopping.wait())
        try:
            await asyncio.wait({gone, stopping}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            connection.close(reset=self._reset)
            # uvicorn answers 500 for an application that ends in silence, unless the client is gone.
            await gone
        finally:
            gone.cancel()
            stopping.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

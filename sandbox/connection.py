"""Simulate network failures: reset a connection, or keep it open without an answer and then close it.

ASGI does not expose the socket. So uvicorn gets a protocol class (`http_protocol`) that puts the connection
into each request's state. The class also wakes slow and unanswered requests when the server stops, so they
cannot delay the shutdown.
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
    """A client's connection. `stopping` is set when the server shuts down."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.stopping = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the server stops."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def close(self, *, reset: bool) -> None:
        """Close the connection immediately, with a TCP reset or a normal close."""
        if reset and not self._transport.is_closing():  # the client may have disconnected already
            linger = (socket.SOL_SOCKET, socket.SO_LINGER, RESET_INSTEAD_OF_FIN)
            self._transport.get_extra_info("socket").setsockopt(*linger)
        self._transport.abort()


class ConnectionProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which also sets `scope["state"]["connection"]` for every request."""

    def connection_made(self, transport: Any) -> None:
        """Put the connection into the state of its requests."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": ClientConnection(transport)}

    def shutdown(self) -> None:
        """Wake the requests that wait, then shut down as uvicorn does."""
        self.app_state["connection"].stopping.set()
        super().shutdown()


http_protocol = ConnectionProtocol
"""The value for `uvicorn.Config(http=...)`."""


class NoAnswer(Response):
    """Sends nothing for `seconds`, then closes the connection. Ends early if the client or the server stops."""

    def __init__(self, seconds: float, *, reset: bool) -> None:
        super().__init__()
        self._seconds = seconds
        self._reset = reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - sends nothing
        """Wait instead of answering."""
        connection: ClientConnection = scope["state"]["connection"]
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        stopping = asyncio.create_task(connection.stopping.wait())
        try:
            await asyncio.wait({gone, stopping}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            connection.close(reset=self._reset)
            # uvicorn sends a 500 if the application returns without an answer while the client is still connected.
            await gone
        finally:
            gone.cancel()
            stopping.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

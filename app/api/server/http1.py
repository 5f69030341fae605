"""Read the requests of one connection one after another, and ignore offers of other protocols.

uvicorn parses all bytes that have arrived, and queues every request it finds. A client that sends requests without
waiting for responses (RFC 9112, section 9.3.2) would fill the memory, so this module feeds the parser only up to the
end of one request. The bytes after it wait. While bytes wait, the socket is not read, so at most one read of them is
kept. While no bytes wait, the socket is read, so a client that disconnects is noticed while its request is handled.

httptools cannot stop at the end of a request. Its input is cut there instead: after `Content-Length` bytes of a body,
or after an empty line, since a request without a `Content-Length` can only end there.
"""

import asyncio
import re
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

BODY_IS_HERE = "is_body_here"  # in a request's state, once all of its body has arrived
PIECE_BYTES = 4 * 1024  # the most that the parser is fed at a time
# A run of empty lines is one cut: no second request ends within it, and a body full of line feeds causes few cuts.
EMPTY_LINES = re.compile(rb"^(?:\r?\n)+", re.MULTILINE)


class _Flow(FlowControl):
    """uvicorn's flow control, except that a route that waits for its body cannot resume reading while bytes wait."""

    _holding = False

    def hold(self) -> None:
        self._holding = True
        self.pause_reading()

    def release(self) -> None:
        if self._holding:
            self._holding = False
            self.resume_reading()

    def resume_reading(self) -> None:
        if not self._holding:
            super().resume_reading()


class WholeResponse(asyncio.Transport):
    """The transport of one response. It holds the head back for the body, which follows at once or not soon.

    uvicorn writes both apart, which would be two system calls and two segments for each response.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = b""
        self._is_first = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hold the head; write anything else, after it."""
        if self._is_first:
            self._is_first = False
            self._held = bytes(data)
            self._loop.call_soon(self.flush)
        else:
            head, self._held = self._held, b""
            self._transport.write(head + data)

    def flush(self) -> None:
        """Write the head, if it is still held."""
        if self._held:
            head, self._held = self._held, b""
            self._transport.write(head)

    def close(self) -> None:
        """Write the head, if it is still held, and close the connection."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether the connection is closing or closed."""
        return self._transport.is_closing()


class SequentialProtocol(HttpToolsProtocol):
    """uvicorn's protocol with one request at a time. It ignores every offer to upgrade.

    A subclass refuses CONNECT, which httptools always treats as an upgrade.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed = b""
        self._at = 0  # everything before this position is parsed
        self._body_left = 0  # remaining bytes of a body with a Content-Length
        self._awaiting_head = True
        self._over = False  # all further bytes are ignored

    def connection_made(self, transport: Any) -> None:
        """Start with a new connection."""
        super().connection_made(transport)
        self.flow = self._reading = _Flow(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the connection and its unparsed bytes."""
        super().connection_lost(exc)
        self._unparsed = b""

    def data_received(self, data: bytes) -> None:
        """Parse up to the end of the current request."""
        self._unparsed = self._unparsed[self._at :] + data
        self._at = 0
        self._parse()

    def on_response_complete(self) -> None:
        """Parse the next request, if it has arrived."""
        self._response.flush()
        super().on_response_complete()
        self._parse()

    def _parse(self) -> None:
        """Feed the parser up to the end of the request that is being answered, and hold back the bytes after it."""
        while self._at < len(self._unparsed) and not self._ignores_input():
            if self._awaiting_head and self._is_answering():
                self._reading.hold()
                return
            begin, self._at = self._at, self._piece_end()
            self._feed(self._unparsed[begin : self._at])
        self._unparsed = b""
        self._at = 0
        if not self.transport.is_closing():
            self._reading.release()

    def _ignores_input(self) -> bool:
        return self._over or self.transport.is_closing()

    def _is_answering(self) -> bool:
        return self._cycle is not None and not self._cycle.response_complete

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        return self.cycle  # None before the first request, despite uvicorn's annotation

    def _piece_end(self) -> int:
        if self._body_left:
            return self._at + min(self._body_left, PIECE_BYTES)
        # Search a copy: `^` must match at its start, since the CR of an empty line may have ended the previous piece.
        piece = self._unparsed[self._at : self._at + PIECE_BYTES]
        cut = EMPTY_LINES.search(piece)
        return self._at + (cut.end() if cut else len(piece))

    def _feed(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade as offer:
                self._parse_again(piece[offer.args[0] :])
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _parse_again(self, rest: bytes) -> None:
        """Parse the head without its `Upgrade`, then `rest`.

        After a head that offers another protocol (RFC 9110, section 7.8) httptools treats all following bytes as that
        protocol: it drops the request's body, and would read the body's bytes as the next request.
        """
        request_line = b"%b %b HTTP/%b\r\n" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        fields = (b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"".join((request_line, *fields, b"\r\n", rest)))

    def on_headers_complete(self) -> None:
        """Start the request, unless its head will be parsed again."""
        if self.parser.should_upgrade():
            return
        self._awaiting_head = False
        self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        super().on_headers_complete()
        self._response = self.cycle.transport = WholeResponse(self.transport, self.loop)

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        self._body_left = max(0, self._body_left - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Prepare for the next request."""
        if self.parser.should_upgrade():
            return
        self._awaiting_head = True
        self.scope["state"][BODY_IS_HERE] = True
        super().on_message_complete()

"""Limits below ASGI, which apply while bytes arrive and before there is a request.

A head has a size limit and a deadline. Bytes outside of bodies (chunk extensions, trailers, blank lines) are counted
too, since the parser keeps some of them. The number of connections is limited: at the limit a new connection replaces
the one that has waited longest without a request, so many silent clients only disturb each other. Where a response is
possible, it is a problem with an `X-Request-ID`.
"""

import asyncio
import re
import socket
import struct
from functools import partial
from http import HTTPStatus
from typing import Any

import structlog
from starlette.responses import Response
from uuid_utils import uuid4
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.api import problems
from app.api.middleware import REQUEST_ID, protect
from app.api.server.http1 import PIECE_BYTES, SequentialProtocol

log = structlog.get_logger(__name__)

MAX_TARGET_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024
# Bytes outside of bodies are counted in pieces.
MAX_STRAY_BYTES = MAX_TARGET_BYTES + MAX_HEADER_BYTES + 2 * PIECE_BYTES
HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")  # a host and its port (RFC 3986, section 3.2)
LINGER_SECONDS = 2.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: close by RST
UNREAD_BODY_SECONDS = 5.0  # for the rest of a body whose request was answered before it was read

MALFORMED = problems.problem(HTTPStatus.BAD_REQUEST, "malformed-request", "this is not HTTP/1.1 (RFC 9112)")
HOST_NEEDED = problems.problem(
    HTTPStatus.BAD_REQUEST, "malformed-request", "a request needs one valid Host header (RFC 9112, section 3.2)"
)
NO_TUNNEL = problems.problem(
    HTTPStatus.METHOD_NOT_ALLOWED,
    "method-not-allowed",
    "the service is not a proxy and opens no tunnels",
    headers={"Allow": "GET, HEAD, POST"},
)
TARGET_TOO_LONG = problems.problem(
    HTTPStatus.REQUEST_URI_TOO_LONG, "target-too-long", f"the target is longer than {MAX_TARGET_BYTES} bytes"
)
HEADERS_TOO_LARGE = problems.problem(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "headers-too-large",
    f"the headers are larger than {MAX_HEADER_BYTES} bytes",
)
HEAD_TIMEOUT = problems.problem(
    HTTPStatus.REQUEST_TIMEOUT, "header-timeout", "the head of the request did not arrive in time"
)
TOO_MANY_CONNECTIONS = problems.problem(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "too-many-connections",
    "the service has no free connection; try again with the same Idempotency-Key",
    headers={"Retry-After": str(problems.RETRY_AFTER_SECONDS)},
)


class _Refused(Exception):
    """Stops the parser. The protocol holds the response."""


class GuardedProtocol(SequentialProtocol):
    """HTTP/1.1 with deadlines and limits."""

    def __init__(
        self,
        *args: Any,
        header_timeout_seconds: float,
        answer_timeout_seconds: float,
        max_connections: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout_seconds = header_timeout_seconds
        self._answer_timeout_seconds = answer_timeout_seconds
        self._max_connections = max_connections
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._unsent = 0  # at the start of the write deadline
        self._begun = False  # whether bytes of the awaited head have arrived
        self._stray_bytes = 0  # since the last part of a body, or the start of a message
        self._header_bytes = 0
        self._answer = MALFORMED
        self._has_served = False
        self._waiting_since = self.loop.time()

    # The connection

    def connection_made(self, transport: Any) -> None:
        """Accept the connection, replacing another if necessary, or refuse it."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # report every unsent byte, see pause_writing
        self._start_deadline(self._header_timeout_seconds)
        if len(self.connections) > self._max_connections and not self._make_room():
            self._refuse(TOO_MANY_CONNECTIONS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the connection and its timers. uvicorn's own timer would keep the object alive until it fires."""
        self._unset_keepalive_if_required()
        self._stop_deadline()
        self._stop_write_deadline()
        super().connection_lost(exc)

    def _make_room(self) -> bool:
        idle = [
            connection
            for connection in self.connections
            if isinstance(connection, GuardedProtocol) and connection.is_idle(self)
        ]
        if not idle:
            return False
        min(idle, key=lambda connection: connection.replacement_order).transport.abort()
        return True

    @property
    def replacement_order(self) -> tuple[bool, float]:
        """The order in which connections are replaced: first those without a request, then by the last response."""
        return self._has_served, self._waiting_since

    def is_idle(self, newcomer: "GuardedProtocol") -> bool:
        """Return whether no client loses a response when this connection is closed for the newcomer."""
        busy = self._is_answering() or self.transport.get_write_buffer_size()
        return self is not newcomer and not busy and not self.transport.is_closing()

    # Bytes

    def _feed(self, piece: bytes) -> None:
        self._stray_bytes += len(piece)
        self._begun = True
        super()._feed(piece)
        if self._stray_bytes > MAX_STRAY_BYTES and not self._over:
            self._refuse(HEADERS_TOO_LARGE)

    def _parse(self) -> None:
        super()._parse()
        if self._awaiting_head and self._begun and self._deadline is None and not self._over:
            self._start_deadline(self._header_timeout_seconds)

    def on_message_begin(self) -> None:
        """Reset the counters at the first byte of a request."""
        super().on_message_begin()
        self._stray_bytes = self._header_bytes = 0
        self._begun = True

    def on_url(self, url: bytes) -> None:
        """Receive a part of the target."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._stop_parsing(TARGET_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive one header. Drop one after the body (a trailer): no route reads trailers."""
        if not self._awaiting_head:
            return
        self._header_bytes += len(name) + len(value) + len(b": \r\n")
        if self._header_bytes > MAX_HEADER_BYTES:
            self._stop_parsing(HEADERS_TOO_LARGE)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request."""
        self._check_head()
        self._stop_deadline()
        super().on_headers_complete()

    def _check_head(self) -> None:
        if (
            self.parser.get_method() == b"CONNECT"
        ):  # the following bytes belong to the tunnel, even if the head announces a body
            self._stop_parsing(NO_TUNNEL)
        hosts = [value for name, value in self.headers if name == b"host"]
        # HTTP/1.0 needs no Host: HAProxy's health checks, for example, send none.
        needed = self.parser.get_http_version() not in {"0.9", "1.0"}
        if len(hosts) > 1 or (needed and not hosts) or not all(HOST.fullmatch(host) for host in hosts):
            self._stop_parsing(HOST_NEEDED)

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body. The route limits its size and time."""
        self._stray_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Prepare for the next request."""
        if self.parser.should_upgrade():
            return  # its head will be parsed again
        self._stop_deadline()
        self._begun = False
        self._stray_bytes = 0
        super().on_message_complete()
        if not self._is_answering() and not self.transport.is_closing():
            # The response was sent before the rest of the body arrived, which stopped uvicorn's timer.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one, with a deadline."""
        self._has_served = True
        self._waiting_since = self.loop.time()
        super().on_response_complete()
        if self._is_answered_early() and self._deadline is None and not self.transport.is_closing():
            self._start_deadline(UNREAD_BODY_SECONDS)

    def _is_answered_early(self) -> bool:
        """Return whether the request whose body is arriving was answered already."""
        return not (self._awaiting_head or self._is_answering())

    # Deadlines

    def _start_deadline(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._over:
            self.transport.abort()
        elif self._awaiting_head and self._begun:
            self._refuse(HEAD_TIMEOUT)
        elif not self._is_answering():
            self._over = True  # the client sent no request, or did not finish its body: no response is due
            self.transport.close()
            self._start_deadline(LINGER_SECONDS)

    def pause_writing(self) -> None:
        """Start a deadline for unsent bytes: a client that reads nothing would hold its connection forever."""
        super().pause_writing()
        self._start_write_deadline()

    def resume_writing(self) -> None:
        """Stop the deadline: all bytes are sent."""
        self._stop_write_deadline()
        super().resume_writing()

    def _start_write_deadline(self) -> None:
        self._stop_write_deadline()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.call_later(self._answer_timeout_seconds, self._on_write_deadline)

    def _stop_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _on_write_deadline(self) -> None:
        """Abort the connection of a client that has read nothing; one that reads slowly may continue."""
        if self.transport.get_write_buffer_size() < self._unsent:
            self._start_write_deadline()
        else:
            self._write_deadline = None
            # Otherwise the kernel would keep the unsent bytes as long as the client stays connected.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()

    # Refusals

    def _stop_parsing(self, answer: Response) -> None:
        """Stop the parser; uvicorn then calls `send_400_response`."""
        self._answer = answer
        raise _Refused

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """Refuse the request that stopped the parser."""
        self._refuse(self._answer)

    def _refuse(self, answer: Response) -> None:
        """Respond, then close after a moment of reading: closing with unread bytes would lose the response."""
        self._over = True
        self._stop_deadline()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._is_answering():
            if self.cycle.response_started:
                self.cycle.keep_alive = False  # the response continues, then the connection closes
                return
            # The body of this request is malformed: its route must neither wait for the rest nor respond.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self._is_answered_early():  # the client would mistake a second response for the one to its next request
            request_id = str(uuid4())
            log.info("http.cut_off", request_id=request_id, status=answer.status_code)
            self.transport.write(self._render(answer, request_id))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_deadline(LINGER_SECONDS)

    def _render(self, answer: Response, request_id: str) -> bytes:
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        headers.append((REQUEST_ID.lower().encode(), request_id.encode()))
        protect(headers)
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return STATUS_LINE[answer.status_code] + lines + b"\r\n" + bytes(answer.body)


def protocol(header_timeout_seconds: float, answer_timeout_seconds: float, max_connections: int) -> Any:
    """Return a protocol factory for `uvicorn.Config(http=...)`."""
    return partial(
        GuardedProtocol,
        header_timeout_seconds=header_timeout_seconds,
        answer_timeout_seconds=answer_timeout_seconds,
        max_connections=max_connections,
    )

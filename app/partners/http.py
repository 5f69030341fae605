"""HTTP/1.1 to a partner: one request at a time on a kept connection. No redirect, no second try, no cookie, no proxy.

    take a kept connection, or connect → write the request → read one response → keep the connection, or close it

A call through aiohttp takes 100 µs of processor time, and an order makes four, which was a sixth of all that an order
took. Through this module a call takes 45. It has only what a call to a partner needs; httptools parses what arrives.

What a caller can rely on:

- *NotConnected*: no byte of the request has left.
- *Interrupted*, or cancelled: the partner may have got the request. The connection is closed, so its late answer cannot
  become the answer to another request.
- *Bounded*: a body is read up to the caller's limit and one read more, everything else up to MAX_HEAD_BYTES.

A connection that the partner has closed, or on which it has sent what no request asked for, is not taken again. It may
close while a request leaves, which is Interrupted; so a connection is kept for a shorter time than servers keep theirs.
"""

import asyncio
import base64
import re
import select
import ssl
from collections import defaultdict
from collections.abc import Mapping
from typing import Self, cast
from urllib.parse import quote, unquote, urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from app.values import immutable

KEEP_SECONDS = 4.0  # uvicorn keeps an idle connection for 5 s
MAX_HEAD_BYTES = 64 * 1024
FIRST_FINAL_STATUS = 200  # those below it are interim: the final response follows (RFC 9110, section 15.2)
PATH = "/%:@!$&'()*+,;=~"  # what a path may have besides letters, digits, `-`, `.` and `_` (RFC 3986, section 3.3)
OUTSIDE_OF_A_FIELD = re.compile(r"[\r\n\0]")

Headers = dict[str, str]  # by names in lower case; of equal names the first one counts


class NotConnected(Exception):
    """There is no connection, so nothing was sent."""


class Interrupted(Exception):
    """The connection ended before the response was complete, or what arrived is no response."""


@immutable
class Reply:
    """A response. `body` is longer than the caller's limit if it was cut."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@immutable
class Target:
    """Where requests go: the server, the path before theirs, and the fields of each. `url`: without credentials."""

    url: str
    host: str
    port: int
    tls: bool
    path: str
    fields: str

    @classmethod
    def parse(cls, base_url: str) -> Self:
        """Read a URL, which may have credentials. With one that is no HTTP URL, nothing will be connected."""
        parts = urlsplit(base_url)
        tls = parts.scheme == "https"
        host = _ascii(parts.hostname or "") if parts.scheme in {"http", "https"} else ""
        named = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port else "")
        fields = f"Host: {named}\r\nUser-Agent: orders\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            fields += f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
        path, port = quote(parts.path.rstrip("/"), safe=PATH), parts.port or (443 if tls else 80)
        return cls(f"{parts.scheme}://{named}{path}", host, port, tls, path, fields)

    def request(self, method: str, path: str, fields: Mapping[str, str], body: bytes | None) -> bytes:
        """Return the bytes of a request. Raises ValueError if a field's value is none."""
        head = f"{method} {self.path}{path} HTTP/1.1\r\n{self.fields}"
        for name, value in fields.items():
            if OUTSIDE_OF_A_FIELD.search(value):
                raise ValueError(f"the value of {name} cannot be sent")
            head += f"{name}: {value}\r\n"
        if body is None:
            return f"{head}\r\n".encode("latin-1")
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def _ascii(host: str) -> str:
    """Return the name as it is asked for (RFC 3490); nothing if it cannot be one."""
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return ""


class HttpClient:
    """Keeps connections to any number of servers. Use it from one event loop, in an `async with`."""

    def __init__(self, keep_seconds: float = KEEP_SECONDS) -> None:
        self._keep_seconds = keep_seconds
        self._kept: defaultdict[Target, list[_Connection]] = defaultdict(list)  # used longest ago first
        self._tls: ssl.SSLContext | None = None  # loading the certificates takes long
        self._closing: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._closing is not None:
            self._closing.cancel()
        for connections in self._kept.values():
            for connection in connections:
                connection.close()

    async def exchange(self, target: Target, request: bytes, connect_seconds: float, limit: int) -> Reply:
        """Send a request, and return its response. The caller bounds the time. Raises NotConnected, Interrupted."""
        if self._is_closed:
            raise RuntimeError("the HTTP client is closed")
        connection = self._take(target) or await self._connect(target, connect_seconds)
        reply = await connection.exchange(request, limit)
        if connection.is_usable and not self._is_closed:
            self._keep(target, connection)
        else:
            connection.close()
        return reply

    def _take(self, target: Target) -> "_Connection | None":
        """Return the kept connection that was used last, if it is still good."""
        kept = self._kept[target]
        oldest = asyncio.get_running_loop().time() - self._keep_seconds
        while kept:
            connection = kept.pop()
            if connection.is_usable and connection.used_at > oldest and not connection.has_unread_bytes():
                return connection
            connection.close()
        return None

    def _keep(self, target: Target, connection: "_Connection") -> None:
        loop = asyncio.get_running_loop()
        connection.used_at = loop.time()
        self._kept[target].append(connection)
        if self._closing is None:
            self._closing = loop.call_later(self._keep_seconds, self._close_old)

    def _close_old(self) -> None:
        """Close the connections that have been idle for long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._keep_seconds
        for kept in self._kept.values():
            while kept and kept[0].used_at <= oldest:
                kept.pop(0).close()
        any_left = any(self._kept.values())
        self._closing = loop.call_later(self._keep_seconds, self._close_old) if any_left else None

    async def _connect(self, target: Target, seconds: float) -> "_Connection":
        if not target.host:
            raise NotConnected("this is no URL of HTTP, or its host is no name")
        loop = asyncio.get_running_loop()
        if target.tls and self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        context, name = (self._tls, target.host) if target.tls else (None, None)
        try:
            async with asyncio.timeout(seconds):
                _, connection = await loop.create_connection(
                    _Connection, target.host, target.port, ssl=context, server_hostname=name
                )
        except (OSError, UnicodeError) as error:  # no route, refused, no such name, no such certificate, no answer
            raise NotConnected(f"{type(error).__name__}: {error}") from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, and the parser of its responses, which calls the methods `on_…`."""

    def __init__(self) -> None:
        self.used_at = 0.0  # on the event loop's clock
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._reply: asyncio.Future[Reply] | None = None  # of the request that waits for it
        self._limit = 0
        self._stray_bytes = 0  # since the last part of a body: of heads, chunk extensions and trailers
        self._has_head = False
        self._headers: Headers = {}
        self._body = bytearray()

    @property
    def is_usable(self) -> bool:
        """Return whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def has_unread_bytes(self) -> bool:
        """Return whether unread bytes or the connection's end have arrived: no request asked for either."""
        poll = select.poll()
        if self._transport is not None:
            poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def exchange(self, request: bytes, limit: int) -> Reply:
        """Send a request, and return its response. Raises Interrupted."""
        if self._transport is None or self._transport.is_closing():
            raise Interrupted("the connection has ended")
        self._limit, self._stray_bytes = limit, 0
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._reply
        except BaseException:
            self._transport.abort()
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # of a TCP connection

    def data_received(self, data: bytes) -> None:
        self._stray_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._fail(f"not HTTP: {error}")
        if self._stray_bytes > MAX_HEAD_BYTES:
            self._fail("the head is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        ends_here = self._has_head and not {"content-length", "transfer-encoding"} & self._headers.keys()
        if ends_here and exc is None:  # RFC 9112, section 6.3, rule 8
            self._complete()
        else:
            self._fail("the connection ended")

    def on_message_begin(self) -> None:
        if self._reply is None or self._reply.done():
            self.close()  # no request asked for this response, and the next request must not get it

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._stray_bytes = 0
        self._body += body
        if len(self._body) > self._limit:
            self._complete()
            self.close()

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < FIRST_FINAL_STATUS:
            self._reset()
            return
        self._stray_bytes = 0
        is_kept = self._parser.should_keep_alive()
        self._complete()
        if not is_kept:
            self.close()

    def _complete(self) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(Reply(self._parser.get_status_code(), self._headers, bytes(self._body)))
        self._reset()

    def _fail(self, reason: str) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(Interrupted(reason))
        self.close()

    def _reset(self) -> None:
        self._has_head, self._headers, self._body = False, {}, bytearray()

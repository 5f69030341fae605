"""Reading a request's body: counted and timed while it comes in, and bounded by its source.

While its body arrives a request holds no place among those that are served (`edge.Place`), so slow bodies take none
from others. How many arrive at a time is bounded for each source apart: a tenant or, without tokens, a peer address.
At the bound the body that has been arriving the longest is given up, not the new one. So slow senders are in each
other's way, and a prompt one gets through, even when all of them come through one proxy and are one address.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, NoReturn

from starlette.requests import Request

from app.api.middleware import Place
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    MalformedRequest,
    Overloaded,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024


class Bodies:
    """Reads the bodies that a process is sent. `max_per_source`: how many of one source arrive at a time."""

    def __init__(self, timeout_seconds: float, max_per_source: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_per_source = max_per_source
        self._arriving: dict[str, dict[asyncio.Timeout, None]] = {}  # of each source, the oldest first

    async def read(self, request: Request, source: str) -> bytes:
        """Read the body, counting, and take the request's place again.

        Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout; Overloaded when the body had to make room for another
        of its source, or when no place is free.
        """
        _check_format(request)
        place: Place = request.state.place
        place.leave()
        body = await self._receive(request, source)
        place.take()
        return body

    async def _receive(self, request: Request, source: str) -> bytes:
        body, size = bytearray(), 0
        try:
            async with self._arrival(source):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= MAX_BODY_BYTES:
                        body += chunk
                    # Read on for a while: closing on unread bytes resets the connection, and the client would see that
                    # instead of the answer (RFC 9112, section 9.6).
                    elif size > MAX_DISCARDED_BYTES:
                        break
        except TimeoutError as error:
            if size <= MAX_BODY_BYTES:
                raise BodyTimeout(f"the body did not arrive within {self._timeout_seconds:g} s") from error
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _arrival(self, source: str) -> AsyncIterator[None]:
        """Count one body while it arrives. Raises TimeoutError when its time is up, Overloaded when it makes room."""
        deadline = asyncio.timeout(self._timeout_seconds)
        try:
            async with deadline:
                self._make_room(source)
                self._arriving.setdefault(source, {})[deadline] = None
                yield
        except TimeoutError as error:
            if deadline not in self._arriving.get(source, {}):
                raise Overloaded("too many bodies of one source arrive at a time") from error
            raise
        finally:
            self._forget(source, deadline)

    def _make_room(self, source: str) -> None:
        bodies = self._arriving.get(source, {})
        if len(bodies) >= self._max_per_source:
            oldest = next(iter(bodies))
            self._forget(source, oldest)
            if not oldest.expired():
                oldest.reschedule(0)  # its time is up now

    def _forget(self, source: str, deadline: asyncio.Timeout) -> None:
        bodies = self._arriving.get(source, {})
        bodies.pop(deadline, None)
        if not bodies:
            self._arriving.pop(source, None)


def has_body(request: Request) -> bool:
    """Tell whether a body comes with the request (RFC 9112, section 6.3); chunked, it may be empty."""
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def _check_format(request: Request) -> None:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    codings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if any(coding.strip() not in {"", "identity"} for coding in codings):
        raise UnsupportedMediaType("the body must not have a Content-Encoding")


def parse_json(body: bytes) -> Any:
    """Parse strictly: UTF-8, exact decimals, no NaN, no duplicate names. Raises MalformedRequest."""
    try:
        # Decoded here: given bytes, json.loads would guess UTF-16 and UTF-32 as well, and let half surrogates pass.
        text = body.decode("utf-8-sig")
        return json.loads(text, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise MalformedRequest(f"the body is not valid JSON: {str(error) or type(error).__name__}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found

"""Read a request's body: limit its size and its time, and how many bodies arrive at a time.

While its body arrives a request holds no `ConcurrencySlot`, so slow bodies cannot use up the slots. The number of
bodies that arrive at a time is limited per source: a tenant or, without tokens, a peer address. At the limit a new body
replaces the one that has been arriving longest. Slow senders therefore only disturb each other, and a prompt sender
gets through, even when all of them come through one proxy and share an address. A body that is complete when its route
reads it waits for nothing and replaces none.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, NoReturn

from starlette.requests import Request

from app.api.middleware import ConcurrencySlot
from app.api.server.http1 import BODY_IS_HERE
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    MalformedRequest,
    Overloaded,
    UnsupportedMediaType,
)

JSON = "application/json"
MAX_BODY_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024


class Bodies:
    """Reads the request bodies of a process. `max_per_source`: how many bodies of one source may arrive at a time."""

    def __init__(self, timeout_seconds: float, max_per_source: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_per_source = max_per_source
        self._arriving: dict[str, dict[asyncio.Timeout, None]] = {}  # by source, oldest first

    async def read(self, request: Request, source: str, media_type: str = JSON) -> bytes:
        """Read the body of this media type. While the rest of it arrives, the request holds no slot.

        Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout; Overloaded when another body of the source replaced
        this one, or when no slot is free.
        """
        _check_format(request, media_type)
        if request.scope["state"].get(BODY_IS_HERE):  # there is nothing to wait for
            return await self._receive(request, contextlib.nullcontext())
        slot: ConcurrencySlot = request.state.slot
        slot.release()
        body = await self._receive(request, self._register_arrival(source))
        slot.acquire()
        return body

    async def _receive(self, request: Request, arrival: contextlib.AbstractAsyncContextManager[None]) -> bytes:
        body, size = bytearray(), 0
        try:
            async with arrival:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= MAX_BODY_BYTES:
                        body += chunk
                    # Discard what follows, up to a limit: closing a socket with unread bytes resets the connection, and
                    # the client would see the reset instead of the answer (RFC 9112, section 9.6).
                    elif size > MAX_DISCARDED_BYTES:
                        break
        except TimeoutError as error:
            if size <= MAX_BODY_BYTES:
                raise BodyTimeout(f"the body did not arrive within {self._timeout_seconds:g} s") from error
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _register_arrival(self, source: str) -> AsyncIterator[None]:
        """Register one body while it arrives. Raises TimeoutError at its deadline, Overloaded when it is replaced."""
        deadline = asyncio.timeout(self._timeout_seconds)
        try:
            async with deadline:
                self._make_room(source)
                self._arriving.setdefault(source, {})[deadline] = None
                yield
        except TimeoutError as error:
            if deadline not in self._arriving.get(source, {}):
                raise Overloaded("too many request bodies from one source are arriving at the same time") from error
            raise
        finally:
            self._forget(source, deadline)

    def _make_room(self, source: str) -> None:
        bodies = self._arriving.get(source, {})
        if len(bodies) >= self._max_per_source:
            oldest = next(iter(bodies))
            self._forget(source, oldest)
            if not oldest.expired():
                oldest.reschedule(0)  # expire it now

    def _forget(self, source: str, deadline: asyncio.Timeout) -> None:
        bodies = self._arriving.get(source, {})
        bodies.pop(deadline, None)
        if not bodies:
            self._arriving.pop(source, None)


def has_body(request: Request) -> bool:
    """Return whether the request has a body (RFC 9112, section 6.3). A chunked body may turn out empty."""
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def _check_format(request: Request, media_type: str) -> None:
    given = request.headers.get("content-type", media_type).partition(";")[0].strip().lower()
    if given != media_type:
        raise UnsupportedMediaType(f"the body must be {media_type}")
    codings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if any(coding.strip() not in {"", "identity"} for coding in codings):
        raise UnsupportedMediaType("the body must not have a Content-Encoding")


def parse_json(body: bytes) -> Any:
    """Parse JSON strictly: UTF-8, exact decimals, no NaN, no duplicate names. Raises MalformedRequest."""
    try:
        # Decode first: given bytes, json.loads would also accept UTF-16 and UTF-32, and lone surrogates.
        text = body.decode("utf-8-sig")
        return STRICT.decode(text)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise MalformedRequest(f"the body is not valid JSON: {str(error) or type(error).__name__}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a duplicate name")
    return value


# Made once: `json.loads` with options makes one for each text.
STRICT = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)

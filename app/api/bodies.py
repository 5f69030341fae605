"""Reading a request's body: counted and timed while it comes in, and bounded by whose it is.

A request takes one of the places in flight when its body is complete (`edge.Place`). So slow bodies hold no place; they
are bounded apart: each tenant, or without tokens each peer address, may have a share of them under way.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping

from starlette.requests import Request

from app.errors import BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType

MAX_BODY_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024


class Bodies:
    """Reads bodies for a process. `max_per_owner`: how many of one tenant or peer address at a time."""

    def __init__(self, timeout_seconds: float, max_per_owner: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_per_owner = max_per_owner
        self._reading: Counter[str] = Counter()

    async def read(self, request: Request, owner: str) -> bytes:
        """Read the body, then take a place.

        Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout; Overloaded when the owner has too many bodies under
        way, or no place is free.
        """
        _check_format(request)
        if self._reading[owner] >= self._max_per_owner:
            raise Overloaded(f"{self._max_per_owner} bodies of one tenant or address are being read")
        self._reading[owner] += 1
        try:
            body = await _read(request, self._timeout_seconds)
        finally:
            self._reading[owner] -= 1
            if not self._reading[owner]:
                del self._reading[owner]
        request.state.place.take()
        return body


def has_body(headers: Mapping[str, str]) -> bool:
    """Tell whether a request's head announces a body (RFC 9112, section 6.3)."""
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _check_format(request: Request) -> None:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    codings = {coding.strip().lower() for coding in ",".join(request.headers.getlist("content-encoding")).split(",")}
    if codings - {"", "identity"}:
        raise UnsupportedMediaType("the body must come without a Content-Encoding")


async def _read(request: Request, timeout_seconds: float) -> bytes:
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_seconds):
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
            raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} s") from error
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)

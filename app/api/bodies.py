"""Reading a request's body: counted and timed while it comes in."""

import asyncio

from starlette.requests import Request

from app.errors import BodyTimeout, BodyTooLarge, UnsupportedMediaType

MAX_BODY_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024


async def read_body(request: Request, timeout_seconds: float) -> bytes:
    """Read the body, counting. Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
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

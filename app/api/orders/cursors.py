"""The cursor of a listing: a position between two orders, and nothing else. Pure.

24 bytes as 32 base64url characters (RFC 4648, section 5): the format, microseconds since 1970, the order's id. Each
position has exactly one cursor, and every text that matches the pattern is a cursor, so no other check is needed.
"""

import base64
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

from app.orders.queries import Position

FORMAT = b"\x01"
PATTERN = "^A[Q-Za-f][A-Za-z0-9_-]{30}$"  # the first two characters encode a first byte of 1
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
INSTANT_BYTES = 7  # until the year 4253


def write_cursor(position: Position) -> str:
    """Return the cursor of a position. Raises OverflowError before 1970 and after 4253."""
    instant = ((position.placed_at - EPOCH) // MICROSECOND).to_bytes(INSTANT_BYTES)
    return base64.urlsafe_b64encode(FORMAT + instant + position.id.bytes).decode()


def read_cursor(text: str) -> Position:
    """Return the position of a cursor. Raises ValueError if it is not a cursor of this listing."""
    if not re.fullmatch(PATTERN.strip("^$"), text):
        raise ValueError("is not a cursor of this listing")
    raw = base64.urlsafe_b64decode(text)
    instant, id_ = raw[1 : 1 + INSTANT_BYTES], raw[1 + INSTANT_BYTES :]
    return Position(EPOCH + int.from_bytes(instant) * MICROSECOND, UUID(bytes=id_))

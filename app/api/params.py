"""Field types that several routes and commands share, each with all its limits.

A value that is unknown, malformed or given twice is refused, never ignored.
"""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated

from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.api.orders import card_numbers
from app.errors import ValidationFailed
from app.orders.model import UNFINISHED, Status

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
MAX_WHOLE_NUMBER = 10_000  # no field that takes a whole number allows more
CARD = "looks like a card number; send the token that your payment provider gave you"
RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt](?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
DURATION = r"^[1-9][0-9]{0,8}[smhd]?$"
UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
# Each text that matches is at most 99 days.
PAUSE = r"^(?:[1-9][0-9]{0,5}s?|[1-9][0-9]{0,3}m|[1-9][0-9]{0,2}h|[1-9][0-9]?d)$"
MAX_LINE_CHARACTERS = 500
# No control character, no other line separator, nothing that reverses text on a terminal.
UNPRINTABLE = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
SURROGATE = r"[\ud800-\udfff]"  # what Python makes of command-line bytes that are not UTF-8; UTF-8 cannot encode it
LETTER_ID = f"^[^{UNPRINTABLE}]+$"
REASON = f"^ *[^ {UNPRINTABLE}][^{UNPRINTABLE}]*$"  # not only spaces


class StrictModel(BaseModel):
    """A query string, or the body of an operator's request. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def storable_text(value: str, shortest_card: int = card_numbers.SHORTEST) -> str:
    """Refuse what Postgres cannot store, and card numbers, which must not be stored. Raises ValueError."""
    if "\x00" in value:
        raise ValueError("must not contain U+0000")
    if card_numbers.has_card_number(value, shortest_card):
        raise ValueError(CARD)
    return value


def whole_number(value: object) -> object:
    """Convert a Decimal without a fraction to an int: to JSON Schema 3.0 is an integer, and some clients send that.

    Only up to the limit: converting 1e999999999 to an int would block the event loop for hours.
    """
    if isinstance(value, Decimal) and 0 <= value <= MAX_WHOLE_NUMBER and value == value.to_integral_value():
        return int(value)
    return value


def parse_seconds(text: object) -> float:
    """Parse a duration: seconds, or a number followed by s, m, h or d. Raises ValueError."""
    match = re.fullmatch(DURATION, text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("must be like 90, 15m, 12h or 7d")
    number = match[0].rstrip("smhd")
    return float(int(number) * UNIT_SECONDS[match[0][len(number) :]])


def parse_pause(text: object) -> float:
    """Parse how long a partner is paused: seconds, or a number followed by s, m, h or d. Raises ValueError."""
    if not isinstance(text, str) or not re.fullmatch(PAUSE, text):
        raise ValueError("must be like 90, 15m, 12h or 7d, and at most 999999, 9999m, 999h or 99d")
    return parse_seconds(text)


def parse_unfinished(text: str) -> Status:
    """Parse a status that is not final. Raises ValueError."""
    if text not in UNFINISHED:
        raise ValueError(f"must be {' or '.join(UNFINISHED)}")
    return Status(text)


def parse_reason(text: object) -> str:
    """Return an operator's reason: one line without surrounding spaces. Raises ValueError."""
    return _parse_line(text, REASON).strip(" ")


def parse_letter_id(text: object) -> str:
    """Return the id of a dead letter, as it is shown: one line. Raises ValueError."""
    return _parse_line(text, LETTER_ID)


def _parse_line(text: object, pattern: str) -> str:
    is_line = isinstance(text, str) and len(text) <= MAX_LINE_CHARACTERS and re.fullmatch(pattern, text)
    if not is_line or re.search(SURROGATE, str(text)):
        raise ValueError(f"must be one line of 1 to {MAX_LINE_CHARACTERS} printable characters")
    return str(text)


def _parse_limit(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= MAX_LIMIT:
        raise ValueError(f"must be a whole number from 1 to {MAX_LIMIT}")
    return int(value)


def _parse_instant(value: object) -> datetime:
    """Parse an RFC 3339 time (section 5.6). Digits beyond microseconds are ignored."""
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise ValueError("must be an RFC 3339 time with its offset; write the + of an offset as %2B in a query")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is outside the years 1 to 9999 in UTC") from error


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(storable_text)]
Limit = Annotated[
    int,
    BeforeValidator(_parse_limit),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}),
]
Instant = Annotated[
    datetime, BeforeValidator(_parse_instant), WithJsonSchema({"type": "string", "format": "date-time"})
]
Since = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema({"type": "string", "pattern": DURATION})]
ReasonText = Annotated[
    str,
    BeforeValidator(parse_reason),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE_CHARACTERS, "pattern": REASON}),
]


async def refuse_repeated_names(request: Request) -> None:
    """Refuse a query string with a name given twice: FastAPI would use the last value. Raises ValidationFailed."""
    if len(request.query_params) < len(request.query_params.multi_items()):
        raise ValidationFailed("a query parameter is given more than once")

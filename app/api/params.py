"""Query strings: models with every limit. What is unknown, given twice or malformed is refused, never passed over."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    WithJsonSchema,
)

from app.api.orders.cursors import PATTERN, read_cursor
from app.api.orders.schemas import Name, validated, whole
from app.errors import ValidationFailed
from app.orders.model import FINAL, Status
from app.orders.queries import Listing, Position

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
MAX_TREATED, DEFAULT_TREATED = 1000, 100  # dead letters in one request, which should not take longer than a second
RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt](?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def _limit(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= MAX_LIMIT:
        raise ValueError(f"must be a whole number from 1 to {MAX_LIMIT}")
    return int(value)


def _instant(value: object) -> datetime:
    """Read RFC 3339, section 5.6, to the microsecond; what is finer is cut off."""
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise ValueError("must be an RFC 3339 time with its offset; the + of an offset is written %2B in a query")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is outside the years 1 to 9999 in UTC") from error


def _cursor(value: object) -> Position:
    return read_cursor(str(value))


Limit = Annotated[
    int,
    BeforeValidator(_limit),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}),
]
Instant = Annotated[datetime, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
Cursor = Annotated[Position, BeforeValidator(_cursor), WithJsonSchema({"type": "string", "pattern": PATTERN})]
Text = Annotated[Name, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[^\\u0000]+$"})]


class Query(BaseModel):
    """A query string: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ListOrders(Query):
    """The query of `GET /orders`."""

    status: Annotated[Status, WithJsonSchema({"type": "string", "enum": list(Status)})] | None = Field(
        default=None, description="only orders of this status"
    )
    customer_id: Text | None = Field(default=None, description="only this customer's orders")
    placed_after: Instant | None = Field(default=None, description="only orders placed later than this")
    placed_before: Instant | None = Field(default=None, description="only orders placed earlier than this")
    limit: Limit = Field(default=DEFAULT_LIMIT, description="orders in one answer")
    cursor: Cursor | None = Field(default=None, description="`next_cursor` of the answer before: go on after it")

    def listing(self, tenant: str) -> Listing:
        """Translate into what is to be read."""
        return Listing(
            tenant=tenant,
            status=self.status,
            customer_id=self.customer_id,
            placed_after=self.placed_after,
            placed_before=self.placed_before,
            after=self.cursor,
            limit=self.limit,
        )


UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_LINE_CHARACTERS = 500
# No control character, no other end of a line, nothing that turns text around on a terminal.
UNPRINTABLE = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
HALF_CHARACTER = r"[\ud800-\udfff]"  # in no UTF-8, but in Python's text, from a command line that is none
LETTER_ID = f"^[^{UNPRINTABLE}]+$"
REASON = f"^ *[^ {UNPRINTABLE}][^{UNPRINTABLE}]*$"  # not spaces alone
UNFINISHED = tuple(sorted(set(Status) - FINAL))
DURATION = r"^[1-9][0-9]{0,8}[smhd]?$"


def seconds(text: object) -> float:
    """Read a duration: seconds, or a number with s, m, h or d behind it. Raises ValueError."""
    match = re.fullmatch(DURATION, text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("must be like 90, 15m, 12h or 7d")
    number = match[0].rstrip("smhd")
    return float(int(number) * UNIT_SECONDS[match[0][len(number) :]])


def flag(text: object) -> bool:
    """Read `true` or `false`. Raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def unfinished(text: str) -> Status:
    """Read a status that is not final. Raises ValueError."""
    if text not in UNFINISHED:
        raise ValueError(f"must be {' or '.join(UNFINISHED)}")
    return Status(text)


def reason(text: object) -> str:
    """Return why an operator does something: one line without surrounding spaces. Raises ValueError."""
    return _line(text, REASON).strip(" ")


def letter_id(text: object) -> str:
    """Return the id of a dead letter, as it is shown: one line. Raises ValueError."""
    return _line(text, LETTER_ID)


def _line(text: object, pattern: str) -> str:
    good = isinstance(text, str) and len(text) <= MAX_LINE_CHARACTERS and re.fullmatch(pattern, text)
    if not good or re.search(HALF_CHARACTER, str(text)):
        raise ValueError(f"must be one line of 1 to {MAX_LINE_CHARACTERS} printable characters")
    return str(text)


Unfinished = Annotated[
    Status, BeforeValidator(unfinished), WithJsonSchema({"type": "string", "enum": list(UNFINISHED)})
]
Flag = Annotated[bool, BeforeValidator(flag), WithJsonSchema({"type": "boolean", "default": False})]
Reason = Annotated[
    str,
    BeforeValidator(reason),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE_CHARACTERS, "pattern": REASON}),
]
LetterId = Annotated[
    str,
    BeforeValidator(letter_id),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE_CHARACTERS, "pattern": LETTER_ID}),
]
Since = Annotated[float, BeforeValidator(seconds), WithJsonSchema({"type": "string", "pattern": DURATION})]


def _given(value: object) -> object:
    if value is None:
        raise ValueError("must be the name of a queue")
    return value


# Which queues there are, `openapi.install` and `OpsDeps.dead_letters_of` know.
Queue = Annotated[Any, BeforeValidator(_given), WithJsonSchema({"x-queue": True})]


class Selecting(Query):
    """Which dead letters are meant."""

    queue: Queue = Field(default=None, description="the queue that gave them up, or its dead-letter queue")
    id: LetterId | None = Field(default=None, description="only the one of this id")
    since: Since | None = Field(
        default=None, description="only those that failed within this time: seconds, or a number with s, m, h or d"
    )


class PeekDeadLetters(Selecting):
    """The query of `GET /ops/dlq`."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="dead letters in one answer")


class TreatDeadLetters(Selecting):
    """The body of `POST /ops/dlq/replay` and `POST /ops/dlq/purge`; `{}` means all that there are, up to the limit."""

    limit: Annotated[StrictInt, Field(ge=1, le=MAX_TREATED), BeforeValidator(whole)] = Field(
        default=DEFAULT_TREATED, description="at most so many"
    )
    dry_run: StrictBool = Field(default=False, description="change nothing; tell what would be done")
    reason: Reason | None = Field(default=None, description="why; it is kept with what was done")


class ListSagas(Query):
    """The query of `GET /ops/sagas`."""

    status: Unfinished | None = Field(default=None, description="only sagas whose orders have this status")
    stuck: Flag = Field(default=False, description="only those that need a look: late, or due and taken by nobody")
    limit: Limit = Field(default=DEFAULT_LIMIT, description="sagas in one answer")


class Reasoned(Query):
    """The body of a change that an operator makes."""

    reason: Reason = Field(description="why; it is kept with what was done")


class Requeue(Query):
    """The body of `POST /ops/outbox/{id}/requeue`."""

    reason: Reason | None = Field(default=None, description="why; it is kept with what was done")


class Limited(Query):
    """A query that has a limit only."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="rows in one answer")


Kind = TypeVar("Kind", bound=Query)


def read_query(kind: type[Kind], given: Sequence[tuple[str, str]]) -> Kind:
    """Validate a query string's names and values. Raises ValidationFailed, with a pointer below `/query` each."""
    values = dict(given)
    if len(values) < len(given):
        raise ValidationFailed("a query parameter is given more than once")
    return validated(kind, values, "the query is not valid", "query")

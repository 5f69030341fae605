"""Query strings: models with every limit. What is unknown, given twice or malformed is refused, never passed over."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from app.api.cursors import PATTERN, read_cursor
from app.api.schemas import Name, mistakes
from app.errors import ValidationFailed
from app.orders.reading import Listing, Position
from app.orders.status import Status

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
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


class Limited(Query):
    """A query that has a limit only."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="rows in one answer")


Kind = TypeVar("Kind", bound=Query)


def read_query(kind: type[Kind], given: Sequence[tuple[str, str]]) -> Kind:
    """Validate a query string's names and values. Raises ValidationFailed, with a pointer below `/query` each."""
    values = dict(given)
    if len(values) < len(given):
        raise ValidationFailed("a query parameter is given more than once")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValidationFailed("the query is not valid", mistakes(error, "query")) from error

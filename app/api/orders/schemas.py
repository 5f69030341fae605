"""The JSON of orders: request models with all limits, their translation into commands, and the response model."""

import functools
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Self

import pycountry
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictInt,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails

from app.api.body import parse_json
from app.api.orders import card_numbers
from app.api.params import CARD, MAX_WHOLE_NUMBER, Name, storable_text, whole_number
from app.api.problems import mistakes
from app.errors import ValidationFailed
from app.orders import money
from app.orders.model import Line, Reason, Status
from app.orders.store import PlaceOrder

MAX_ITEMS = 100
MAX_QUANTITY = MAX_WHOLE_NUMBER
MAX_METADATA_DEPTH = 16
FLAT = ("sku", "quantity", "unit_price")
COUNTRIES = frozenset(country.alpha_2 for country in pycountry.countries)
PLAIN_DECIMAL = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?")
MANY_DIGITS = re.compile(r"(?<!\d)(?:\d[\W_]?){12,18}\d(?!\d)")  # tokens of payment providers do not contain this


def _parse_price(value: object) -> Decimal:
    if isinstance(value, str) and PLAIN_DECIMAL.fullmatch(value):
        return Decimal(value)
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return Decimal(value)
    raise ValueError('must be a number or a decimal string like "9.99"')


def _check_token(value: str) -> str:
    """Refuse anything that looks like a card number, including mistyped ones."""
    if MANY_DIGITS.search(value):
        raise ValueError(CARD)
    return value


def _check_country(value: str) -> str:
    if value not in COUNTRIES:
        raise ValueError("is not an ISO 3166-1 alpha-2 code")
    return value


def _check_currency(value: str) -> str:
    if value not in money.EXPONENTS:
        raise ValueError("is not an ISO 4217 code of a currency with minor units")
    return value


Sku = Annotated[
    str,
    Field(min_length=1, max_length=50),
    AfterValidator(lambda sku: storable_text(sku, card_numbers.SHORTEST_IN_SKU)),
]
PostalCode = Annotated[str, Field(min_length=1, max_length=20), AfterValidator(storable_text)]
Price = Annotated[
    Decimal,
    BeforeValidator(_parse_price),
    Field(ge=0, le=money.MAX_TOTAL),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^[0-9]{1,30}(\.[0-9]{1,30})?$"},
            ],
            "examples": ["9.99"],
        }
    ),
]


class _Input(BaseModel):
    """A request object. Unknown names are refused; each snake_case name is also accepted in camelCase."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, value: object) -> object:
        return cls._long_form(_rename_fields(value, cls._snake())) if isinstance(value, dict) else value

    @classmethod
    @functools.cache  # for every object of every request
    def _snake(cls) -> Mapping[str, str]:
        """Return the snake_case name of each name in camelCase."""
        return {to_camel(name): name for name in cls._names()}

    @classmethod
    def _names(cls) -> Iterable[str]:
        return cls.model_fields

    @classmethod
    def _long_form(cls, value: dict[str, Any]) -> dict[str, Any]:
        return value


def _locate(place: tuple[str | int, ...], error: ValueError) -> ValidationError:
    """Return `error` with its place in the body, which a plain ValueError from a model's validator would not have."""
    details = InitErrorDetails(type="value_error", loc=place, input=None, ctx={"error": error})
    return ValidationError.from_exception_data("PlaceOrderRequest", [details])


def _rename_fields(value: dict[str, Any], snake: Mapping[str, str]) -> dict[str, Any]:
    renamed = {snake.get(name, name): part for name, part in value.items()}
    if len(renamed) < len(value):
        raise ValueError("a field is given twice, in snake_case and in camelCase")
    return renamed


class ItemRequest(_Input):
    """One line of an order."""

    sku: Sku
    quantity: Annotated[StrictInt, Field(ge=1, le=MAX_QUANTITY), BeforeValidator(whole_number)]
    unit_price: Price


class Address(_Input):
    """Where to ship to."""

    name: Name
    line1: Name
    line2: Name | None = None
    city: Name
    region: Name | None = None
    postal_code: PostalCode | None = None
    country: Annotated[
        str,
        AfterValidator(_check_country),
        WithJsonSchema({"type": "string", "pattern": "^[A-Z]{2}$", "description": "ISO 3166-1 alpha-2"}),
    ]


class PlaceOrderRequest(_Input):
    """The body of `POST /orders`. A one-item order may be written flat: `{"sku", "quantity", "unit_price"}`."""

    items: Annotated[list[ItemRequest], Field(min_length=1, max_length=MAX_ITEMS)]
    currency: Annotated[
        str,
        AfterValidator(_check_currency),
        WithJsonSchema({"type": "string", "pattern": "^[A-Z]{3}$", "description": "ISO 4217"}),
    ] = "USD"
    customer_id: Name | None = None
    payment_method: Annotated[Name, AfterValidator(_check_token)] | None = Field(
        default=None, description="a token of the payment provider; null: the customer's default"
    )
    shipping_address: Address | None = None
    metadata: dict[Name, Any] | None = None
    _lines: tuple[Line, ...] = PrivateAttr()

    @classmethod
    def _names(cls) -> Iterable[str]:
        return (*cls.model_fields, *FLAT)

    @classmethod
    def _long_form(cls, value: dict[str, Any]) -> dict[str, Any]:
        flat = {name: part for name, part in value.items() if name in FLAT}
        if not flat:
            return value
        if "items" in value:
            raise ValueError("an order is written either flat or with items, not both")
        return {**{name: part for name, part in value.items() if name not in FLAT}, "items": [flat]}

    @field_validator("metadata", mode="after")
    @classmethod
    def _storable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else _make_storable(value, MAX_METADATA_DEPTH)

    @model_validator(mode="after")
    def _payable(self) -> Self:
        lines = []
        for number, item in enumerate(self.items):
            try:
                lines.append(Line(item.sku, item.quantity, money.to_minor(item.unit_price, self.currency)))
            except ValueError as error:
                raise _locate(("items", number, "unit_price"), error) from error
        self._lines = tuple(lines)
        total = sum(line.total_minor for line in lines)
        if not 0 < total <= money.max_total_minor(self.currency):
            raise _locate(("items",), ValueError(f"the total must be more than 0 and at most {money.MAX_TOTAL}"))
        return self

    def lines(self) -> tuple[Line, ...]:
        """Return the lines, prices in minor units."""
        return self._lines

    def command(self, tenant: str) -> PlaceOrder:
        """Translate into the command of the store."""
        return PlaceOrder(
            tenant=tenant,
            currency=self.currency,
            lines=self.lines(),
            customer_id=self.customer_id,
            payment_method=self.payment_method,
            shipping_address=None if self.shipping_address is None else self.shipping_address.model_dump(),
            metadata=self.metadata,
        )

    def normal_form(self) -> dict[str, Any]:
        """Return the same value for every way to write the request: prices in minor units, without defaults."""
        form = self.model_dump(exclude_defaults=True, exclude={"items"})
        form["items"] = [[line.sku, line.quantity, line.unit_price_minor] for line in self.lines()]
        return form


def _make_storable(value: Any, depth: int) -> Any:
    """Return JSON that Postgres can store, and that is the same when read back."""
    if depth < 0:
        raise ValueError("is nested too deeply")
    match value:
        case dict():
            return {_make_storable(name, depth): _make_storable(part, depth - 1) for name, part in value.items()}
        case list():
            return [_make_storable(part, depth - 1) for part in value]
        case Decimal():
            number = float(value)
            if number in {float("inf"), float("-inf")}:
                raise ValueError("has a number that is too large")
            return _make_storable(int(number), depth) if number.is_integer() and abs(number) < 2**53 else number
        case str():
            value.encode()  # UnicodeEncodeError (a lone surrogate) is a ValueError
            return storable_text(value)
        case int() if card_numbers.has_card_number(str(value)):
            raise ValueError(CARD)
        case _:
            return value


def read_place_order(body: bytes) -> PlaceOrderRequest:
    """Parse and validate the body. Raises MalformedRequest, ValidationFailed."""
    value = parse_json(body)
    try:
        return PlaceOrderRequest.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise ValidationFailed("the body is not a valid order", mistakes(details)) from error


class ItemAnswer(BaseModel):
    """One line of an order, in a response."""

    sku: str
    quantity: int
    unit_price: str
    line_total: str


class OrderAnswer(BaseModel):
    """An order, in a response. Amounts are decimal strings with all of the currency's decimals."""

    id: str
    status: Status
    status_reason: Reason | None
    customer_id: str | None
    currency: str
    items: list[ItemAnswer]
    total: str
    placed_at: str
    updated_at: str
    version: int
    tracking_id: str | None

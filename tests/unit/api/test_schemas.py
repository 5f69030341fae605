"""The body of `POST /orders`: its forms, its limits, and that invalid input is only ever refused."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.api.orders.schemas import MAX_METADATA_DEPTH, PlaceOrderRequest, read_place_order
from app.errors import MalformedRequest, ValidationFailed
from app.orders.model import Line

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
ADDRESS = {"name": "Ada", "line1": "1 Main St", "city": "Oslo", "postal_code": "0150", "country": "NO"}
LONG = {"items": [LINE], "customer_id": "cus_1", "payment_method": "pm_card_visa", "shipping_address": ADDRESS}


def read(body: object) -> PlaceOrderRequest:
    return read_place_order(json.dumps(body).encode())


def refused(body: object) -> list[tuple[str, str]]:
    """Return the pointers and details with which the body is refused."""
    with pytest.raises(ValidationFailed) as caught:
        read(body)
    return [(each["pointer"], each["detail"]) for each in caught.value.errors]


def order(**fields: Any) -> dict[str, Any]:
    return {"items": [LINE], **fields}


def line(**fields: Any) -> dict[str, Any]:
    return {"items": [LINE | fields]}


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else "deep"


@pytest.mark.parametrize(
    "body",
    [
        LINE,
        {"sku": "WIDGET", "quantity": 3, "unitPrice": "9.99"},
        {"sku": "WIDGET", "quantity": 3, "unitPrice": 9.99},
        {"items": [{"sku": "WIDGET", "quantity": 3, "unitPrice": 9.99}]},
        {"currency": "USD", **LINE},
        {"items": [LINE], "customerId": None, "payment_method": None, "metadata": None},
    ],
)
def test_all_spellings_are_the_same_order(body: dict[str, Any]) -> None:
    """The flat form, the long form and camelCase have one normal form."""
    asked, long_form = read(body), read({"items": [LINE]})
    assert asked.command("t") == long_form.command("t")
    assert asked.normal_form() == long_form.normal_form()


def test_camel_case_is_read_at_every_level() -> None:
    """Items and addresses may use camelCase too."""
    camel = {
        "items": [{"sku": "WIDGET", "quantity": 3, "unitPrice": "9.99"}],
        "customerId": "cus_1",
        "paymentMethod": "pm_card_visa",
        "shippingAddress": {"name": "Ada", "line1": "1 Main St", "city": "Oslo", "postalCode": "0150", "country": "NO"},
    }
    assert read(camel) == read(LONG)


def test_metadata_keeps_its_own_names() -> None:
    """Names in metadata are not converted."""
    assert read(order(metadata={"camelCase": {"unitPrice": 1}})).metadata == {"camelCase": {"unitPrice": 1}}


@pytest.mark.parametrize("flat", LINE.items())
def test_flat_and_long_form_together_are_refused(flat: tuple[str, object]) -> None:
    """An order has one of the two forms."""
    assert refused(order(**dict([flat]))) == [("", "an order is written either flat or with items, not both")]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (line(unitPrice=1), "/items/0"),
        (order(customer_id="a", customerId="a"), ""),
        ({**LINE, "unitPrice": 1}, ""),
    ],
)
def test_a_field_in_both_spellings_is_refused(body: dict[str, Any], pointer: str) -> None:
    """snake_case and camelCase of one field are a mistake."""
    assert refused(body) == [(pointer, "a field is given twice, in snake_case and in camelCase")]


def test_lines_of_one_sku_stay_separate() -> None:
    """Lines are not merged."""
    assert read({"items": [LINE, LINE]}).lines() == (Line("WIDGET", 3, 999), Line("WIDGET", 3, 999))


AT_THE_LIMIT = [
    line(sku="s" * 50),
    line(quantity=1),
    line(quantity=10_000),
    line(unit_price="9.990"),
    line(unit_price=9.990),
    line(unit_price=7),
    line(unit_price="1.5") | {"currency": "KWD"},
    line(quantity=1, unit_price="9999999999.99"),
    line(quantity=1, unit_price="9999999999") | {"currency": "JPY"},
    {"items": [LINE, LINE | {"unit_price": 0}]},
    {"items": [LINE] * 100},
    order(metadata={}),
    order(metadata=nested(MAX_METADATA_DEPTH)),
    order(customer_id="c" * 200, payment_method="pm_1234567890123456789012"),
    order(shipping_address={"name": "Ada", "line1": "1 Main St", "city": "Oslo", "country": "NO"}),
]


@pytest.mark.parametrize("body", AT_THE_LIMIT)
def test_values_at_the_limits_are_accepted(body: dict[str, Any]) -> None:
    """Each limit is inclusive."""
    assert read(body).command("t").lines


BEYOND = [
    (line(sku=""), "/items/0/sku"),
    (line(sku="s" * 51), "/items/0/sku"),
    (line(sku="a\x00b"), "/items/0/sku"),
    (line(sku="\ud800"), "/items/0/sku"),
    (line(sku=7), "/items/0/sku"),
    (line(quantity=0), "/items/0/quantity"),
    (line(quantity=10_001), "/items/0/quantity"),
    (line(quantity="3"), "/items/0/quantity"),
    (line(quantity=3.5), "/items/0/quantity"),
    (line(quantity=True), "/items/0/quantity"),
    (line(unit_price=-0.01), "/items/0/unit_price"),
    (line(unit_price="-1"), "/items/0/unit_price"),
    (line(unit_price=True), "/items/0/unit_price"),
    (line(unit_price="1e2"), "/items/0/unit_price"),
    (line(unit_price="NaN"), "/items/0/unit_price"),
    (line(unit_price="٣"), "/items/0/unit_price"),
    (line(unit_price=""), "/items/0/unit_price"),
    (line(unit_price=None), "/items/0/unit_price"),
    (line(unit_price="10000000000"), "/items/0/unit_price"),
    (line(unit_price="9.999"), "/items/0/unit_price"),
    (line(unit_price=0.5) | {"currency": "JPY"}, "/items/0/unit_price"),
    ({"items": [LINE, LINE | {"unit_price": "1.0001"}], "currency": "KWD"}, "/items/1/unit_price"),
    (line(unit_price=0), "/items"),
    (line(quantity=2, unit_price="9999999999.99"), "/items"),
    ({"items": []}, "/items"),
    ({"items": [LINE] * 101}, "/items"),
    ({"items": None}, "/items"),
    ({}, "/items"),
    ([], ""),
    (None, ""),
    (order(surprise=1), "/surprise"),
    (order(**{"a/b~c": 1}), "/a~1b~0c"),
    (line(colour="red"), "/items/0/colour"),
    (order(status="confirmed"), "/status"),
    (order(currency="usd"), "/currency"),
    (order(currency="ZZZ"), "/currency"),
    (order(currency="XAU"), "/currency"),
    (order(currency=None), "/currency"),
    (order(customer_id=""), "/customer_id"),
    (order(customer_id="c" * 201), "/customer_id"),
    (order(payment_method="4242424242424242"), "/payment_method"),
    (order(payment_method="4242 4242 4242 4242"), "/payment_method"),
    (order(payment_method="card:3782-822463-10005"), "/payment_method"),
    (order(shipping_address={}), "/shipping_address/name"),
    (order(shipping_address=ADDRESS | {"country": "XX"}), "/shipping_address/country"),
    (order(shipping_address=ADDRESS | {"country": "no"}), "/shipping_address/country"),
    (order(shipping_address=ADDRESS | {"planet": "Earth"}), "/shipping_address/planet"),
    (order(shipping_address=ADDRESS | {"postal_code": "1" * 21}), "/shipping_address/postal_code"),
    (order(metadata=[]), "/metadata"),
    (order(metadata=nested(MAX_METADATA_DEPTH + 1)), "/metadata"),
    (order(metadata={"a": ["\x00"]}), "/metadata"),
    (order(metadata={"a": {"\x00": 1}}), "/metadata"),
    (order(metadata={"a": ["\udfff"]}), "/metadata"),
    (order(metadata={"a": {"\ud800": 1}}), "/metadata"),
]


@pytest.mark.parametrize(("body", "pointer"), BEYOND)
def test_values_beyond_a_limit_are_refused(body: object, pointer: str) -> None:
    """The pointer names the place."""
    assert pointer in [where for where, _ in refused(body)]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e99999"])
def test_a_huge_number_is_refused_in_metadata(number: str) -> None:
    """A number that no JSON reader can hold is refused."""
    with pytest.raises(ValidationFailed):
        read_place_order(json.dumps(order(metadata={"n": 0})).replace(": 0", f": {number}").encode())


def test_a_refused_card_number_is_not_repeated() -> None:
    """The problem does not contain the card number."""
    assert "4242" not in str(refused(order(payment_method="4242424242424242")))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"sku": "\xed\xa0\x80", "quantity": 1, "unit_price": 1}',
        json.dumps(LINE).encode("utf-16"),
        json.dumps(LINE).encode("utf-32"),
        b'{"sku": "a", "quantity": 1, "unit_price": NaN}',
        b'{"sku": "a", "quantity": 1, "unit_price": -Infinity}',
        b'{"sku": "a", "sku": "a", "quantity": 1, "unit_price": 1}',
        b'{"items": [], "metadata": {"a": {"b": 1, "b": 1}}}',
        b'{"sku": "a", "quantity": 1, "unit_price": 1e9999999999999999999}',
        b'{"sku": "a", "quantity": 1, "unit_price": ' + b"1" * 5000 + b"}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_invalid_json_is_malformed(body: bytes) -> None:
    """It is a MalformedRequest."""
    with pytest.raises(MalformedRequest, match="the body is not valid JSON"):
        read_place_order(body)


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # including lone surrogates and U+0000
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*PlaceOrderRequest.model_fields, *LINE, "unitPrice", "shippingAddress"])
ALMOST_AN_ORDER = st.dictionaries(FIELDS, ANYTHING, max_size=3).map(lambda fields: {**LONG, **fields})


@given(st.binary() | (ANYTHING | ALMOST_AN_ORDER).map(lambda value: json.dumps(value).encode()))
@example(b'{"\\ud800": 1}')
def test_any_body_is_accepted_or_refused(body: bytes) -> None:
    """No body raises any other error."""
    try:
        asked = read_place_order(body)
    except (MalformedRequest, ValidationFailed) as error:
        str(error).encode()
    else:
        json.dumps([asked.normal_form(), asked.metadata], allow_nan=False).encode()


def test_a_quantity_may_be_written_with_decimals() -> None:
    """3.0 is the quantity 3."""
    body = b'{"sku": "WIDGET", "quantity": 3.0, "unit_price": "9.99"}'
    assert read_place_order(body).lines()[0].quantity == 3


def test_a_huge_quantity_is_refused_quickly() -> None:
    """1e999999999 is not converted to an integer."""
    with pytest.raises(ValidationFailed):
        read_place_order(b'{"sku": "WIDGET", "quantity": 1e999999999, "unit_price": "9.99"}')

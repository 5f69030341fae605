"""Card numbers are found in every spelling, and other numbers are accepted."""

import json
import time
from typing import Any

import pytest

from app.api.orders.card_numbers import SHORTEST_IN_SKU, has_card_number
from app.api.orders.schemas import read_place_order
from app.api.params import CARD
from app.errors import ValidationFailed

VISA = "4242424242424242"
LINE = {"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}
ADDRESS = {"name": "Ada", "line1": "1 Main St", "city": "Oslo", "country": "NO"}

CARDS = [
    VISA,
    "4242 4242 4242 4242",
    "4242-4242-4242-4242",
    "4242.4242.4242.4242",
    "4242_4242_4242_4242",
    "4242\u00a04242\u00a04242\u00a04242",
    "4 2 4 2 4 2 4 2 4 2 4 2 4 2 4 2",
    "４２４２４２４２４２４２４２４２",
    "378282246310005",
    "3782 822463 10005",
    "5555555555554444",
    "2223003122003222",
    "6011111111111117",
    "30569309025904",
    "3056 930902 5904",
    "3566002020360505",
    "6200000000000005",
    "6759649826438453",
    f"pm_{VISA}",
    "card 4242 4242 4242 4242, until 12/29",
    "30 4242-4242-4242-4242-12",
]
OTHERS = [
    "pm_card_visa",
    "4242424242424241",
    "424242424242424242424242",
    "2026-06-30 12:59:59.123456",
    "1700000000000",
    "+49 30 90182042",
    "4006381333931",
    "01890a5d-ac96-774b-bcce-b302099a8057",
    "1234 5678 9012 3452",
]


@pytest.mark.parametrize("text", CARDS)
def test_a_card_number_is_found(text: str) -> None:
    """It is found in every spelling."""
    assert has_card_number(text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_numbers_are_not_card_numbers(text: str) -> None:
    """Numbers that only resemble card numbers do not match."""
    assert not has_card_number(text)


def test_an_article_number_is_accepted_as_a_sku() -> None:
    """A GTIN has up to 14 digits; longer card numbers are refused."""
    gtin = "30569309025904"  # 14 digits, as Diners Club has
    assert not has_card_number(gtin, SHORTEST_IN_SKU)
    assert has_card_number(VISA, SHORTEST_IN_SKU)


@pytest.mark.parametrize("text", ["4 ", "44 ", "444 ", "4", "34444 ", "4,5,6,3,", "4242-4242 "])
def test_the_longest_body_is_searched_quickly(text: str) -> None:
    """The search takes linear time."""
    began = time.process_time()
    has_card_number((text * 65_536)[:65_536])
    assert time.process_time() - began < 5  # takes about 30 ms; without the guard it would take minutes


def placed(**fields: Any) -> bytes:
    return json.dumps({"items": [LINE], "shipping_address": ADDRESS} | fields).encode()


ANYWHERE = {
    "payment_method": placed(payment_method=VISA),
    "a mistyped payment_method": placed(payment_method="4242 4242 4242 4241"),
    "customer_id": placed(customer_id=VISA),
    "sku": placed(items=[LINE | {"sku": VISA}]),
    **{
        f"address {name}": placed(shipping_address=ADDRESS | {name: VISA})
        for name in ("name", "line1", "line2", "city")
    },
    "postal_code": placed(shipping_address=ADDRESS | {"postal_code": VISA}),
    "region": placed(shipping_address=ADDRESS | {"region": VISA}),
    "metadata's value": placed(metadata={"note": f"charge {VISA}"}),
    "metadata's name": placed(metadata={VISA: True}),
    "metadata's depth": placed(metadata={"a": [{"b": [VISA]}]}),
    "metadata's inner name": placed(metadata={"a": {VISA: True}}),
    "metadata's number": placed(metadata={"card": int(VISA)}),
    "metadata's decimal": placed(metadata={"card": 1}).replace(b": 1}", f": {VISA}.0}}".encode()),
}


@pytest.mark.parametrize("body", ANYWHERE.values(), ids=ANYWHERE.keys())
def test_a_card_number_is_refused_in(body: bytes) -> None:
    """Every text field refuses a card number."""
    with pytest.raises(ValidationFailed) as caught:
        read_place_order(body)
    assert [each["detail"] for each in caught.value.errors] == [CARD]
    assert VISA not in json.dumps(caught.value.errors)


def test_ordinary_numbers_are_accepted_everywhere() -> None:
    """Ids, article numbers, times and amounts are accepted."""
    read_place_order(
        placed(
            customer_id="cus_1234567890",
            payment_method="pm_1NVChw2eZvKYlo2CHxiM5E2E",
            items=[LINE | {"sku": "4006381333931"}],
            metadata={"ean": "4006381333931", "at": "2026-06-30 12:59:59.123456", "ms": 1700000000000, "ratio": 0.5},
        )
    )

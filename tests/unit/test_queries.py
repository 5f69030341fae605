"""Query strings are read to the letter: a value is understood as it was meant, or refused with its place."""

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.openapi import query_parameters
from app.api.ops.outbox import ListOutbox
from app.api.orders.listing import ListOrders
from app.api.params import read_query
from app.errors import ValidationFailed
from app.orders.model import Status
from app.orders.queries import Listing

GOOD = {
    ("limit", "1"): 1,
    ("limit", "100"): 100,
    ("limit", "020"): 20,
    ("status", "compensating"): Status.COMPENSATING,
    ("customer_id", "cus 1/ü"): "cus 1/ü",
    ("placed_after", "2026-11-21T03:47:27Z"): datetime(2026, 11, 21, 3, 47, 27, tzinfo=UTC),
    ("placed_after", "2026-11-21t03:47:27.5z"): datetime(2026, 11, 21, 3, 47, 27, 500_000, UTC),
    ("placed_before", "2026-11-21T03:47:27+05:30"): datetime(2026, 11, 20, 22, 17, 27, tzinfo=UTC),
    ("placed_before", "2026-11-21T03:47:27.123456789-00:00"): datetime(2026, 11, 21, 3, 47, 27, 123_456, UTC),
}
BAD = [
    ("limit", ""),
    ("limit", "0"),
    ("limit", "101"),
    ("limit", "-1"),
    ("limit", "+1"),
    ("limit", "1.0"),
    ("limit", " 5"),
    ("limit", "1_0"),
    ("limit", "٥"),
    ("limit", "9" * 5000),
    ("status", ""),
    ("status", "Pending"),
    ("status", "shipped"),
    ("customer_id", ""),
    ("customer_id", "c" * 201),
    ("customer_id", "a\x00b"),
    ("placed_after", ""),
    ("placed_after", "yesterday"),
    ("placed_after", "1763696847"),
    ("placed_after", "2026-11-21"),
    ("placed_after", "2026-11-21T03:47:27"),
    ("placed_after", "2026-11-21T03:47Z"),
    ("placed_after", "2026-11-21T03:47:27 02:00"),
    ("placed_after", "2026-11-21 03:47:27Z"),
    ("placed_after", "2026-02-30T03:47:27Z"),
    ("placed_after", "2026-11-21T24:00:00Z"),
    ("placed_after", "2026-11-21T03:47:27+24:00"),
    ("placed_after", "0000-01-01T00:00:00Z"),
    ("placed_after", "0001-01-01T00:00:00+01:00"),
    ("placed_before", "9999-12-31T23:59:59-01:00"),
    ("placed_before", "２026-11-21T03:47:27Z"),
    ("cursor", ""),
    ("cursor", "A" * 32),
    ("surprise", "1"),
    ("Limit", "1"),
    ("placed/after~", "1"),
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_good_value_is_understood(name: str, value: str) -> None:
    assert getattr(read_query(ListOrders, [(name, value)]), name) == GOOD[name, value]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_or_an_unknown_name_is_refused_with_its_place(name: str, value: str) -> None:
    with pytest.raises(ValidationFailed) as caught:
        read_query(ListOrders, [("limit", "5"), (name, value)] if name != "limit" else [(name, value)])
    assert [each["pointer"] for each in caught.value.errors] == [f"/query/{name.replace('~', '~0').replace('/', '~1')}"]


@pytest.mark.parametrize("name", ["limit", "status", "surprise"])
def test_a_name_given_twice_is_refused(name: str) -> None:
    with pytest.raises(ValidationFailed, match="more than once"):
        read_query(ListOrders, [(name, "5"), (name, "5")])


def test_an_empty_query_is_the_newest_orders() -> None:
    assert read_query(ListOrders, []).listing("t") == Listing(tenant="t", limit=20)
    assert read_query(ListOutbox, []).limit == 20


@given(st.lists(st.tuples(st.sampled_from([*ListOrders.model_fields, "x"]), st.text())))
def test_any_query_is_understood_or_refused(given: list[tuple[str, str]]) -> None:
    with contextlib.suppress(ValidationFailed):
        assert read_query(ListOrders, given).limit


def test_every_parameter_is_documented_as_optional_and_never_null() -> None:
    documented = query_parameters(ListOrders)
    assert [each["name"] for each in documented] == list(ListOrders.model_fields)
    assert all(each["description"] and not each["required"] for each in documented)
    assert {each["name"]: each["schema"]["type"] for each in documented} == dict.fromkeys(
        ListOrders.model_fields, "string"
    ) | {"limit": "integer"}

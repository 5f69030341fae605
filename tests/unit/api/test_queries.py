"""Query strings, as FastAPI reads them with our models: each value is understood, or refused with its place."""

from datetime import UTC, datetime
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Query
from hypothesis import given
from hypothesis import strategies as st

from app.api import problems
from app.api.ops.outbox import ListOutbox
from app.api.orders.listing import ListOrders
from app.api.params import StrictModel, refuse_repeated_names
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


Pairs = list[tuple[str, str]]


async def read(model: type[StrictModel], pairs: Pairs) -> Any:
    """Return the query as its route gets it, or the problem that the caller gets."""
    app, found = FastAPI(), []
    problems.install(app)

    @app.get("/", dependencies=[Depends(refuse_repeated_names)])
    async def route(query: Annotated[model, Query()]) -> None:  # type: ignore[valid-type]
        found.append(query)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://orders") as client:
        answer = await client.get("/", params=tuple(pairs))
    return found[0] if answer.status_code == 200 else answer.json()


@pytest.mark.parametrize(("name", "value"), GOOD)
async def test_a_good_value_is_understood(name: str, value: str) -> None:
    """A value in the documented form reaches the route as a value of its type."""
    assert getattr(await read(ListOrders, [(name, value)]), name) == GOOD[name, value]


@pytest.mark.parametrize(("name", "value"), BAD)
async def test_a_bad_value_is_refused_with_its_place(name: str, value: str) -> None:
    """A malformed value, or an unknown name, is a 422 whose one error points to the parameter."""
    problem = await read(ListOrders, [("limit", "5"), (name, value)] if name != "limit" else [(name, value)])
    assert (problem["status"], problem["code"]) == (422, "validation-failed")
    assert problem["detail"] == "the query is not valid"
    assert [error["pointer"] for error in problem["errors"]] == [f"/query/{name.replace('~', '~0').replace('/', '~1')}"]


@pytest.mark.parametrize("name", ["limit", "status", "surprise"])
async def test_a_name_given_twice_is_refused(name: str) -> None:
    """FastAPI alone would use the last value of two."""
    problem = await read(ListOrders, [(name, "5"), (name, "5")])
    assert (problem["status"], problem["code"]) == (422, "validation-failed")
    assert problem["detail"] == "a query parameter is given more than once"


async def test_an_empty_query_is_the_newest_orders() -> None:
    """Without parameters a listing starts at the newest order, with the default limit."""
    assert (await read(ListOrders, [])).to_listing("t") == Listing(tenant="t", limit=20)
    assert (await read(ListOutbox, [])).limit == 20


@given(st.lists(st.tuples(st.sampled_from([*ListOrders.model_fields, "x"]), st.text(st.characters(codec="utf-8")))))
async def test_any_query_is_understood_or_refused(pairs: Pairs) -> None:
    """No query makes the service fail."""
    result = await read(ListOrders, pairs)
    assert result["status"] == 422 if isinstance(result, dict) else result.limit

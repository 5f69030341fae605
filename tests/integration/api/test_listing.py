"""`GET /orders`: every order once, newest first, also while orders are placed, and read by an index."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from app import db
from app.api.orders.cursors import write_cursor
from app.orders import queries
from app.orders.model import Line, Order, Status, rfc3339
from app.orders.queries import Listing, Position
from tests.harness.api import assert_problem
from tests.harness.databases import patient_pool
from tests.harness.orders import TENANT, placed

MANY = 6000
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
INDEXES: dict[str, tuple[Listing, str]] = {
    "the newest": (Listing(TENANT, 20), "orders_tenant_placed_at_id_idx"),
    "after a position": (Listing(TENANT, 20, after=Position(NOON, uuid4())), "orders_tenant_placed_at_id_idx"),
    "an hour": (
        Listing(TENANT, 20, placed_after=NOON - timedelta(hours=1), placed_before=NOON),
        "orders_tenant_placed_at_id_idx",
    ),
    "a customer": (Listing(TENANT, 20, customer_id="cus_8"), "orders_tenant_customer_id_placed_at_id_idx"),
    "a customer, after a position": (
        Listing(TENANT, 20, customer_id="cus_8", after=Position(NOON, uuid4())),
        "orders_tenant_customer_id_placed_at_id_idx",
    ),
    "confirmed": (Listing(TENANT, 20, status=Status.CONFIRMED), "orders_tenant_placed_at_id_idx"),
    **{
        status: (
            Listing(TENANT, 20, status=status, after=Position(NOON, uuid4())),
            "orders_status_tenant_placed_at_id_idx",
        )
        for status in (Status.PENDING, Status.COMPENSATING, Status.REJECTED, Status.CANCELLED)
    },
}


async def pages(api: httpx.AsyncClient, **params: Any) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield the orders of each page."""
    cursor: str | None = None
    while True:
        answer = await api.get("/orders", params=params | ({} if cursor is None else {"cursor": cursor}))
        body = answer.raise_for_status().json()
        yield body["orders"]
        cursor = body["next_cursor"]
        if cursor is None:
            return


async def listed(api: httpx.AsyncClient, **params: Any) -> list[str]:
    """Return the ids on all pages, in order."""
    return [order["id"] async for page in pages(api, **params) for order in page]


async def newest_first(pool: db.Pool, condition: str = "true") -> list[str]:
    query = f"SELECT id FROM orders WHERE tenant = 'default' AND {condition} ORDER BY placed_at DESC, id DESC"  # noqa: S608 - constants
    return [str(row["id"]) for row in await pool.fetch(query)]


async def place_many(pool: db.Pool, number: int = MANY) -> None:
    """Insert orders: one a second until noon, one in a hundred not confirmed, half of them another tenant's."""
    await pool.execute(
        """
        WITH placed AS (
            INSERT INTO orders (id, tenant, status, customer_id, currency, total_minor, version, placed_at, updated_at)
            SELECT gen_random_uuid(), CASE n % 2 WHEN 0 THEN 'default' ELSE 'other' END,
                   CASE n % 400 WHEN 0 THEN 'pending' WHEN 100 THEN 'compensating' WHEN 200 THEN 'rejected'
                       WHEN 300 THEN 'cancelled' ELSE 'confirmed' END,
                   'cus_' || n % 100, 'USD', 999, 2, $2::timestamptz - make_interval(secs => n), $2
            FROM generate_series(1, $1) AS n
            RETURNING id
        )
        INSERT INTO order_lines (order_id, number, sku, quantity, unit_price_minor)
        SELECT id, 1, 'WIDGET', 1, 999 FROM placed
        """,
        number,
        NOON,
    )
    await pool.execute("ANALYZE orders, order_lines")


async def test_orders_are_listed_newest_first_and_in_full(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """The listing shows each order as `GET /orders/{id}` does."""
    lines = (Line("A", 1, 5), Line("B", 2, 7), Line("A", 3, 0))
    orders = [
        await placed(pool, lines=lines, customer_id="cus_1", metadata={"a": 1}, currency=currency)
        for currency in ("USD", "JPY")
    ]
    answer = await api.get("/orders")
    assert answer.json() == {"orders": [order.representation() for order in reversed(orders)], "next_cursor": None}
    assert answer.headers["content-type"] == "application/json"
    one = await api.get(f"/orders/{orders[0].id}")
    assert answer.json()["orders"][1] == one.json()


async def test_a_tenant_without_orders_has_an_empty_list(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """Orders of other tenants are not listed."""
    await placed(pool, tenant="other")
    assert (await api.get("/orders")).json() == {"orders": [], "next_cursor": None}


@pytest.mark.parametrize("limit", [1, 7, 20, 100])
async def test_every_order_is_on_exactly_one_page(api: httpx.AsyncClient, pool: db.Pool, limit: int) -> None:
    """For every page size, also when orders with the same instant are split between two pages."""
    orders = [await placed(pool) for _ in range(40)]
    await placed(pool, tenant="other")
    await pool.execute("UPDATE orders SET placed_at = $1 WHERE id = ANY($2)", NOON, [each.id for each in orders[5:25]])
    found = [page async for page in pages(api, limit=limit)]
    assert [order["id"] for page in found for order in page] == await newest_first(pool)
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert 0 < len(found[-1]) <= limit


async def test_new_orders_cause_no_duplicate_and_no_gap(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """Orders placed while a caller reads the pages do not change the listing of older ones."""
    before = {str((await placed(pool)).id) for _ in range(30)}
    seen: list[str] = []
    async for page in pages(api, limit=4):
        seen += [order["id"] for order in page]
        await asyncio.gather(*(placed(pool) for _ in range(5)))
    assert len(seen) == len(set(seen))
    assert set(seen) == before
    assert len(await listed(api)) > len(before)


async def test_filters_combine_with_pages(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """Each filter, and all of them together, select the right orders on all pages."""
    await place_many(pool, 1200)
    after, before = NOON - timedelta(seconds=900), NOON - timedelta(seconds=100)
    window = {"placed_after": rfc3339(after), "placed_before": "2026-11-21T13:58:20+02:00"}
    within = f"placed_at > '{after}' AND placed_at < '{before}'"
    assert rfc3339(before) == "2026-11-21T11:58:20.000000Z"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"status": "rejected"}, "status = 'rejected'"),
        ({"status": "confirmed"}, "status = 'confirmed'"),
        ({"customer_id": "cus_8"}, "customer_id = 'cus_8'"),
        (window, within),
        (
            {"customer_id": "cus_0", "status": "pending", **window},
            f"customer_id = 'cus_0' AND status = 'pending' AND {within}",
        ),
    ]
    for params, condition in cases:
        found = await listed(api, limit=3 if len(params) > 1 else 100, **params)
        assert found == await newest_first(pool, condition)
        assert found
    assert await listed(api, customer_id="nobody") == []


async def test_both_bounds_are_exclusive(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """`placed_after` and `placed_before` exclude orders at the instant itself."""
    order = await placed(pool)
    instant, moment = order.placed_at, timedelta(microseconds=1)
    assert await listed(api, placed_after=rfc3339(instant)) == []
    assert await listed(api, placed_before=rfc3339(instant)) == []
    assert await listed(
        api, placed_after=rfc3339(instant - moment), placed_before=rfc3339(instant + moment)
    ) == [str(order.id)]  # fmt: skip


async def test_a_cursor_gives_no_access_to_another_tenant(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """A cursor made from another tenant's order only marks a position."""
    mine = await placed(pool)
    theirs = await placed(pool, tenant="other")
    assert await listed(api, cursor=write_cursor(Position(theirs.placed_at, theirs.id))) == [str(mine.id)]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "limit=",
        "limit=1&limit=2",
        "status=shipped",
        "cursor=rubbish",
        "cursor=AQ%00",
        "placed_after=2026-11-21T03:47:27",
        "placed_after=2026-11-21T03:47:27+02:00",
        "placed_before=0001-01-01T00:00:00%2B01:00",
        "customer_id=%00",
        "offset=5",
        "=",
    ],
)
async def test_an_invalid_query_is_refused(api: httpx.AsyncClient, query: str) -> None:
    """An unknown, repeated or malformed parameter is a 422."""
    assert_problem(await api.get(f"/orders?{query}"), 422, "validation-failed")


@pytest.mark.parametrize("case", INDEXES)
async def test_a_page_is_read_by_an_index(pool: db.Pool, case: str) -> None:
    """No table scan, no sort, and few rows read beyond those returned."""
    await place_many(pool)
    listing, index = INDEXES[case]
    statement, values = queries.select(listing)
    told = await pool.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *values)
    nodes = list(_nodes(json.loads(told)[0]["Plan"]))
    scans = [node for node in nodes if node.get("Relation Name") == "orders"]
    assert [scan.get("Index Name") for scan in scans] == [index]
    assert {node["Node Type"] for node in nodes} & {"Seq Scan", "Bitmap Heap Scan"} == set()
    [scan] = scans
    assert 0 < scan["Actual Rows"] <= listing.limit + 1
    assert scan.get("Rows Removed by Filter", 0) <= listing.limit


def _nodes(plan: dict[str, Any]) -> Any:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


async def test_no_generic_plan_is_used_for_a_page(pool: db.Pool, database_url: str) -> None:
    """Postgres switches to a generic plan after five runs of a prepared statement, which may fit no value."""
    await placed(pool, customer_id="cus_1")
    listing = Listing(TENANT, 20, customer_id="cus_1", after=Position(NOON + timedelta(days=36_500), uuid4()))
    async with patient_pool(database_url, 1) as one:
        for _ in range(10):
            assert len((await queries.page(one, listing))[0]) == 1
        kept = await one.fetch("SELECT statement FROM pg_prepared_statements")
    assert [row["statement"] for row in kept if "order_lines" in row["statement"]] == []


async def test_a_page_is_one_statement(pool: db.Pool, database_url: str) -> None:
    """The number of orders and lines does not matter."""
    orders = [await placed(pool, lines=(Line("A", 1, 5),) * 10) for _ in range(10)]
    asked: list[str] = []

    class Heard(asyncpg.Connection):
        """A connection that records prepared statements too, which its query log leaves out."""

        async def prepare(self, query: str, **options: Any) -> Any:
            asked.append(query)
            return await super().prepare(query, **options)

    async with patient_pool(database_url, 1, Heard) as heard:
        async with db.connection(heard) as conn:
            conn.add_query_logger(lambda query: asked.append(query.query))
        asked.clear()
        found, following = await queries.page(heard, Listing(TENANT, 100))
    assert ([_shown(each) for each in found], following) == ([_shown(each) for each in reversed(orders)], None)
    assert len([query for query in asked if "orders" in query]) == 1


def _shown(order: Order) -> dict[str, Any]:
    return order.representation()

"""The queries of the list of orders and of its search: each reads a few rows, by an index, whatever is asked for."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from app import db
from app.operations import order_list
from app.operations.order_list import SUMMARIES, Attention, OrderFilter, PageQuery
from app.operations.order_search import LOOKUPS, MAX_HITS, Kind
from app.orders.model import Status
from app.orders.queries import Position, list_tenants
from tests.harness.wait import AMPLE_SECONDS

MANY, LIMIT, CONSUMER = 20_000, 20, "saga"
UNFINISHED = MANY // 200
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
POSITION = Position(NOON - timedelta(hours=1), db.first_id(NOON - timedelta(hours=1)))
BY_ID, BY_TENANT = "orders_pkey", "orders_tenant_placed_at_id_idx"
BY_CUSTOMER, BY_STATUS = "orders_tenant_customer_id_placed_at_id_idx", "orders_status_tenant_placed_at_id_idx"
HOUR = OrderFilter(placed_after=NOON - timedelta(hours=2), placed_before=NOON - timedelta(minutes=30))
LISTS: dict[str, tuple[OrderFilter, str]] = {
    "all": (OrderFilter(), BY_ID),
    "all, an hour": (HOUR, BY_ID),
    "all, confirmed": (OrderFilter(status=Status.CONFIRMED), BY_ID),
    "all, rare": (OrderFilter(status=Status.COMPENSATING), BY_STATUS),
    "all, of a customer": (OrderFilter(customer_id="cus_8"), BY_CUSTOMER),
    "of a tenant": (OrderFilter("tenant_1"), BY_TENANT),
    "of a tenant, an hour": (replace(HOUR, tenant="tenant_1"), BY_TENANT),
    "of a tenant, rare": (OrderFilter("tenant_1", Status.REJECTED), BY_STATUS),
    "of a tenant, of a customer": (OrderFilter("tenant_1", customer_id="cus_8"), BY_CUSTOMER),
    **{attention: (OrderFilter(attention=attention), BY_ID) for attention in Attention},
}
PAGES = {
    "newest": PageQuery(LIMIT),
    "older": PageQuery(LIMIT, older_than=POSITION),
    "newer": PageQuery(LIMIT, newer_than=POSITION),
}
IDS: dict[Kind, tuple[Any, str]] = {
    Kind.ORDER: (uuid4(), BY_ID),
    Kind.CUSTOMER: ("cus_8", BY_CUSTOMER),
    Kind.IDEMPOTENCY_KEY: ("key_8", "idempotency_keys_pkey"),
    Kind.TRACKING: ("trk_8", "orders_tracking_id_idx"),
    Kind.PAYMENT: ("pay_8", "saga_steps_payment_id_idx"),
    Kind.TRACE: (f"{8:032x}", "sagas_trace_id_idx"),
}
PAST = """
    WITH placed AS (
        INSERT INTO orders (id, tenant, status, customer_id, currency, total_minor, version, placed_at, updated_at,
                            tracking_id)
        SELECT (lpad(to_hex((extract(epoch FROM $2::timestamptz) * 1000)::bigint - n * 1000), 12, '0')
                || left(replace(gen_random_uuid()::text, '-', ''), 20))::uuid,
               'tenant_' || n % 10,
               CASE n % 400 WHEN 0 THEN 'pending' WHEN 100 THEN 'compensating' WHEN 201 THEN 'rejected'
                   ELSE 'confirmed' END,
               'cus_' || n % 100, 'USD', 999, 2, $2::timestamptz - make_interval(secs => n), $2,
               CASE WHEN n % 400 NOT IN (0, 100, 201) THEN 'trk_' || n END
        FROM generate_series(1, $1) AS n
        RETURNING id, status, placed_at
    ), numbered AS (
        SELECT *, row_number() OVER () AS n FROM placed
    ), lines AS (
        INSERT INTO order_lines (order_id, number, sku, quantity, unit_price_minor)
        SELECT id, 1, 'WIDGET', 1, 999 FROM placed
    ), keys AS (
        INSERT INTO idempotency_keys (tenant, key, fingerprint, fingerprint_version, status, location, body, created_at,
                                      expires_at)
        SELECT 'tenant_' || n % 10, 'key_' || n, '', 1, 201, '/orders/' || id, '', placed_at, 'infinity' FROM numbered
    ), consumed AS (
        INSERT INTO inbox (consumer, message_id, processed_at) SELECT 'saga', id, placed_at FROM placed
    ), started AS (
        INSERT INTO sagas (id, plan_version, direction, step, attempts, version, next_attempt_at, deadline_at,
                           traceparent, started_at, updated_at, finished_at)
        SELECT id, 1, 'forward', NULL, 0, 9, placed_at, placed_at, '00-' || lpad(to_hex(n), 32, '0') || '-1-00',
               placed_at, placed_at, CASE WHEN status NOT IN ('pending', 'compensating') THEN placed_at END
        FROM numbered RETURNING id
    )
    INSERT INTO saga_steps (saga_id, step, action, attempt, outcome, reply)
    SELECT id, step, 'do', 1, 'done',
           CASE step WHEN 'charge_payment' THEN jsonb_build_object('payment_id', 'pay_' || n) END
    FROM numbered, unnest('{reserve_inventory,charge_payment,create_shipment}'::text[]) AS step
"""


@pytest.fixture
async def past(pool: db.Pool) -> db.Pool:
    """Many orders: one a second until noon, of ten tenants and a hundred customers, nearly all of them confirmed."""
    async with pool.acquire() as conn:
        await conn.execute("ALTER TABLE sagas DISABLE TRIGGER ALL; ALTER TABLE saga_steps DISABLE TRIGGER ALL")
        await conn.execute("ALTER TABLE order_lines DISABLE TRIGGER ALL")
        await conn.execute(PAST, MANY, NOON, timeout=AMPLE_SECONDS)
        await conn.execute("VACUUM ANALYZE", timeout=AMPLE_SECONDS)
    return pool


async def explain(pool: db.Pool, statement: str, *values: Any) -> list[dict[str, Any]]:
    """Run the statement; return the nodes of its plan that read a table."""
    told = await pool.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *values)
    return [node for node in _nodes(json.loads(told)[0]["Plan"]) if "Relation Name" in node or "Index Name" in node]


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


def rows_read(node: dict[str, Any]) -> int:
    """Return how many rows the node looked at, in all its loops."""
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed"))
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])


async def test_each_list_is_read_by_an_index(past: db.Pool) -> None:
    """No list reads a table from end to end, or many more rows than it shows of each tenant."""
    async with past.acquire() as conn:
        tenants = await list_tenants(conn, order_list.MAX_TENANTS)
    assert len(tenants) == 10
    for name, (wanted, index) in LISTS.items():
        for page, query in PAGES.items():
            listed = [wanted.tenant] if wanted.tenant else tenants
            statement, values = order_list.select(wanted, query, listed, CONSUMER)
            nodes = await explain(past, statement, *values)
            assert "Seq Scan" not in {node["Node Type"] for node in nodes}, (name, page)
            assert index in {node.get("Index Name") for node in nodes}, (name, page, nodes)
            most = UNFINISHED if wanted.attention else (LIMIT + 1) * (len(listed) if wanted.reads_each_tenant else 2)
            assert max(map(rows_read, nodes)) <= most, (name, page)


async def test_each_lookup_reads_an_index(past: db.Pool) -> None:
    """So a search costs a few reads of pages, for one tenant and for all."""
    assert {lookup.kind for lookup in LOOKUPS} == set(Kind)
    async with past.acquire() as conn:
        tenants = await list_tenants(conn, order_list.MAX_TENANTS)
    for lookup in LOOKUPS:
        value, index = IDS[lookup.kind]
        for allowed in (tenants, ["tenant_8"]) if lookup.by_tenant else (None, ["tenant_8"]):
            nodes = await explain(past, lookup.statement, value, allowed)
            assert "Seq Scan" not in {node["Node Type"] for node in nodes}, lookup.kind
            assert index in {node.get("Index Name") for node in nodes}, lookup.kind
            assert max(map(rows_read, nodes)) <= 10 * MAX_HITS, lookup.kind


async def test_a_page_of_rows_reads_only_its_orders(past: db.Pool) -> None:
    """Lines, sagas and logs are read by their keys, and those of confirmed orders not at all."""
    ids = [row["id"] for row in await past.fetch("SELECT id FROM orders ORDER BY id DESC LIMIT 400")]
    nodes = await explain(past, SUMMARIES, ids[:50], CONSUMER)
    assert "Seq Scan" not in {node["Node Type"] for node in nodes}
    assert max(map(rows_read, nodes)) <= 50
    async with past.acquire() as conn:
        orders = await order_list.read_summaries(conn, ids, CONSUMER)
    assert [order.order_id for order in orders] == ids
    assert {order.status for order in orders} == {"pending", "compensating", "rejected", "confirmed"}


async def test_a_list_is_planned_for_its_own_values(past: db.Pool) -> None:
    """Postgres switches to a generic plan after five runs of a prepared statement, which may fit no value."""
    for _ in range(10):
        await order_list.read_page(past, OrderFilter(customer_id="cus_8"), PageQuery(LIMIT), CONSUMER)
    kept = await past.fetch("SELECT statement FROM pg_prepared_statements")
    assert [row["statement"] for row in kept if "listed (tenant)" in row["statement"]] == []


async def test_tenants_are_listed_once_by_name(pool: db.Pool) -> None:
    """Each has orders; no more than asked for are looked up."""
    async with pool.acquire() as conn:
        assert await list_tenants(conn, 5) == []
    await pool.execute(
        """
        INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
        SELECT gen_random_uuid(), tenant, 'confirmed', 'USD', 1, 2, now(), now()
        FROM unnest('{b,a,c,b,d}'::text[]) AS tenant
        """
    )
    async with pool.acquire() as conn:
        assert await list_tenants(conn, 5) == ["a", "b", "c", "d"]
        assert await list_tenants(conn, 2) == ["a", "b"]

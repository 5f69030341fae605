"""Read orders with all that belongs to them, in pages. One statement reads a page, so its rows are consistent."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app import db
from app.orders.events import PLACED
from app.orders.model import FINAL, Status
from app.values import immutable

# There is no index from orders to published events. The id of an order's last event is made just after `updated_at`, by
# the same clock, so a few milliseconds of the primary key almost always contain it. Few orders need the wider range,
# after a slow statement, and fewer the whole table.
FIRST_ID = "(lpad(to_hex(floor(extract(epoch FROM {at}) * 1000)::bigint + {ms}), 12, '0') || repeat('0', 20))::uuid"
BEFORE_MS, AFTER_MS, LONG_AFTER_MS = 2, 100, 10_000
SHOWN_ORDERS = 10  # of an item
BY_RANGE = "WHERE id > $1 AND id <= $2 ORDER BY id LIMIT $3"
BY_IDS = "WHERE id = ANY($1::uuid[]) ORDER BY id"

PAGE = """
WITH page AS MATERIALIZED (SELECT * FROM orders {selected})
SELECT o.id, o.tenant, o.status, o.total_minor, o.currency, o.payment_method, o.version, o.placed_at, o.updated_at,
       o.cancel_requested_at, lines.skus, lines.quantities, coalesce(lines.total_minor, 0) AS lines_total_minor,
       s.id IS NOT NULL AS has_saga, s.started_at, s.finished_at, s.next_attempt_at AS saga_next_attempt_at,
       greatest(o.updated_at, s.updated_at, i.processed_at, placed.published_at) AS changed_at,
       placed.id IS NOT NULL AS has_placed, placed.tenant AS placed_tenant, placed.sequence AS placed_sequence,
       placed.published_at, placed.parked_at, placed.last_error, placed.next_attempt_at AS placed_next_attempt_at,
       placed.resends, i.message_id IS NOT NULL AS was_delivered, i.processed_at, i.dead_at, i.purged_at,
       last.type AS last_type, last.sequence AS last_sequence, last.tenant AS last_tenant,
       CASE WHEN s.id IS NOT NULL THEN (
           SELECT array_agg(step || ' ' || action) FROM (
               SELECT step, action FROM saga_steps WHERE saga_id = o.id AND outcome = 'done'
               GROUP BY step, action HAVING count(*) > 1
           ) AS twice
       ) END AS repeated,
       CASE WHEN s.id IS NOT NULL THEN (
           SELECT reply ->> 'payment_id' FROM saga_steps
           WHERE saga_id = o.id AND action = 'do' AND outcome = 'done' AND reply ? 'payment_id' LIMIT 1
       ) END AS payment_id
FROM page AS o
CROSS JOIN LATERAL (
    SELECT array_agg(sku) AS skus, array_agg(quantity) AS quantities,
           sum(quantity * unit_price_minor)::bigint AS total_minor
    FROM order_lines WHERE order_id = o.id
) AS lines
LEFT JOIN sagas AS s ON s.id = o.id
LEFT JOIN outbox AS placed ON placed.id = o.id
LEFT JOIN inbox AS i ON i.consumer = {consumer} AND i.message_id = o.id::text
LEFT JOIN LATERAL (
    SELECT last.type, last.sequence, last.tenant FROM outbox AS last
    WHERE last.id >= {first_id} AND last.id < {last_id}
      AND last.subject = o.id::text AND last.sequence = o.version AND last.type <> '{placed_type}'
    LIMIT 1
) AS last ON o.status IN ({final})
ORDER BY o.id
"""

LATER = f"""
SELECT last.subject, last.type, last.sequence, last.tenant
FROM orders AS o JOIN outbox AS last
  ON last.subject = o.id::text AND last.sequence = o.version AND last.type <> '{PLACED}'
 AND last.id >= {FIRST_ID.format(at="o.updated_at", ms=-BEFORE_MS)}
 AND last.id < {FIRST_ID.format(at="o.updated_at", ms=LONG_AFTER_MS)}
WHERE o.id = ANY($1::uuid[])
"""  # noqa: S608 - constants
ANYWHERE = f"""
SELECT last.subject, last.type, last.sequence, last.tenant
FROM outbox AS last JOIN orders AS o ON o.id = last.subject::uuid
WHERE last.subject = ANY(SELECT unnest($1::uuid[])::text) AND last.sequence = o.version AND last.type <> '{PLACED}'
"""  # noqa: S608 - constants


@immutable
class OrderFacts:
    """An order as the tables show it. `placed_*` and `published_at` … `resends` are of its `order.placed` row.

    `processed_at`, `dead_at`, `purged_at` are of the inbox row of that event; `last_*` of the event of its final
    status. `repeated`: steps that were recorded as done more than once. `changed_at`: the latest change.
    """

    id: UUID
    tenant: str
    status: Status
    total_minor: int
    currency: str
    payment_method: str | None
    version: int
    placed_at: datetime
    updated_at: datetime
    changed_at: datetime
    cancel_requested_at: datetime | None
    items: Mapping[str, int]
    lines_total_minor: int
    has_saga: bool
    started_at: datetime | None
    finished_at: datetime | None
    saga_next_attempt_at: datetime | None
    has_placed: bool
    placed_tenant: str | None
    placed_sequence: int | None
    published_at: datetime | None
    parked_at: datetime | None
    last_error: str | None
    placed_next_attempt_at: datetime | None
    resends: int | None
    was_delivered: bool
    processed_at: datetime | None
    dead_at: datetime | None
    purged_at: datetime | None
    last_type: str | None
    last_sequence: int | None
    last_tenant: str | None
    repeated: Sequence[str]
    payment_id: str | None

    @property
    def is_final(self) -> bool:
        """Return whether its status never changes again."""
        return self.status in FINAL

    @property
    def never_started(self) -> bool:
        """Return whether it was cancelled before its saga started: no status came in between."""
        return self.status is Status.CANCELLED and self.version == 2  # noqa: PLR2004 - placed, then cancelled


@immutable
class Bounds:
    """The orders of a pass: after `start`, up to `end`, `orders` in all, as of `at` on Postgres's clock."""

    at: datetime
    start: UUID
    end: UUID
    orders: int


async def find_bounds(
    conn: db.Connection, start: UUID | None, since_seconds: float | None, until_seconds: float, limit: int | None
) -> Bounds:
    """Find the orders of a pass: the first `limit` after `start` that were placed between these ages."""
    at = await db.now(conn)
    since = UUID(int=0) if since_seconds is None else db.first_id(at - timedelta(seconds=since_seconds))
    first = max(start or since, since)
    end = db.first_id(at - timedelta(seconds=until_seconds)) if until_seconds else UUID(int=2**128 - 1)
    row = await conn.fetchrow(
        """
        SELECT count(*) AS orders, max(id::text)::uuid AS last
        FROM (SELECT id FROM orders WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3) AS selected
        """,
        first,
        end,
        limit,
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return Bounds(at, first, first if row["last"] is None else UUID(int=row["last"].int), row["orders"])


async def read_page(conn: db.Connection, consumer: str, after: UUID, end: UUID, limit: int) -> list[OrderFacts]:
    """Return the next `limit` orders by id."""
    page = [_parse(row) for row in await conn.fetch(_statement(BY_RANGE, "$4"), after, end, limit, consumer)]
    return await _add_last_events(conn, page, LATER)


async def read_again(conn: db.Connection, consumer: str, ids: Sequence[UUID]) -> list[OrderFacts]:
    """Return these orders. Their last events are looked for in the whole outbox."""
    orders = [_parse(row) for row in await conn.fetch(_statement(BY_IDS, "$2"), ids, consumer)]
    return await _add_last_events(conn, await _add_last_events(conn, orders, LATER), ANYWHERE)


async def _add_last_events(conn: db.Connection, orders: Sequence[OrderFacts], query: str) -> list[OrderFacts]:
    """Look again for the last events of final orders that have none."""
    missing = [order.id for order in orders if order.is_final and order.last_type is None]
    rows = {row["subject"]: row for row in await conn.fetch(query, missing)} if missing else {}
    return [
        replace(order, last_type=row["type"], last_sequence=row["sequence"], last_tenant=row["tenant"])
        if (row := rows.get(str(order.id))) is not None
        else order
        for order in orders
    ]


async def find_missing(conn: db.Connection, ids: Sequence[UUID]) -> set[UUID]:
    """Return which of these are ids of no order."""
    rows = await conn.fetch("SELECT id FROM orders WHERE id = ANY($1::uuid[])", ids)
    return set(ids) - {UUID(int=row["id"].int) for row in rows}


async def find_orders_with(conn: db.Connection, sku: str) -> list[UUID]:
    """Return the newest orders that contain an item. Reads all lines: only for items whose stock is wrong."""
    query = "SELECT DISTINCT order_id FROM order_lines WHERE sku = $1 ORDER BY order_id DESC LIMIT $2"
    return [UUID(int=row["order_id"].int) for row in await conn.fetch(query, sku, SHOWN_ORDERS)]


def _statement(selected: str, consumer: str) -> str:
    final = ", ".join(f"'{status.value}'" for status in sorted(FINAL))
    first_id, last_id = (FIRST_ID.format(at="o.updated_at", ms=ms) for ms in (-BEFORE_MS, AFTER_MS))
    return PAGE.format(
        selected=selected, consumer=consumer, first_id=first_id, last_id=last_id, final=final, placed_type=PLACED
    )


def _parse(row: Any) -> OrderFacts:
    items: dict[str, int] = {}
    for sku, quantity in zip(row["skus"] or (), row["quantities"] or (), strict=True):
        items[sku] = items.get(sku, 0) + quantity
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(OrderFacts) if field.name != "items"}
    values |= {"id": UUID(int=row["id"].int), "status": Status(row["status"]), "repeated": row["repeated"] or ()}
    return OrderFacts(items=items, **values)

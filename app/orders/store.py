"""Write and read orders: SQL on the tables of orders. A function with a connection runs in the caller's transaction."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from app import db
from app.errors import OrderNotFound
from app.idempotency.transaction import AlreadyCommitted
from app.messaging import outbox
from app.orders import events
from app.orders.model import Line, Order, Reason, Status, may_become
from app.values import immutable


@immutable
class PlaceOrder:
    """A customer's validated command to place an order."""

    tenant: str
    currency: str
    lines: tuple[Line, ...]
    customer_id: str | None = None
    payment_method: str | None = None
    shipping_address: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None


DEFAULT_CANCEL_REASON = Reason.CANCELLED_BY_CUSTOMER  # older releases have no other, and leave `cancel_reason` null


@immutable
class TracedOrder:
    """A new order, or a new version of one, and the trace that its event continues."""

    order: Order
    trace: Mapping[str, str]


def new_order(command: PlaceOrder, trace: Mapping[str, str]) -> TracedOrder:
    """Make a new order with its id, before any transaction."""
    now = datetime.now(UTC)
    order = Order(
        id=uuid7(), status=Status.PENDING, status_reason=None, tracking_id=None, version=1, placed_at=now,
        updated_at=now, **{field.name: getattr(command, field.name) for field in dataclasses.fields(command)},
    )  # fmt: skip
    return TracedOrder(order, trace)


async def insert(conn: db.Connection, rows: Sequence[TracedOrder]) -> None:
    """Write orders, their lines and their events in the caller's transaction.

    Raises AlreadyCommitted when an order exists: its id is new, so an earlier attempt committed the same rows.
    """
    orders = [row.order for row in rows]
    try:
        await _insert(conn, orders)
    except asyncpg.UniqueViolationError as error:
        raise AlreadyCommitted from error
    await _emit(conn, rows)


async def _emit(conn: db.Connection, rows: Sequence[TracedOrder]) -> None:
    found = [events.event_for(row.order, row.trace) for row in rows]
    if present := [event for event in found if event is not None]:
        await outbox.add(conn, present)


async def _insert(conn: db.Connection, orders: Sequence[Order]) -> None:
    lines = [(order.id, number, line) for order in orders for number, line in enumerate(order.lines, 1)]
    await conn.execute(
        """
        WITH placed AS (
            INSERT INTO orders (id, tenant, status, customer_id, currency, total_minor, payment_method,
                                shipping_address, metadata, version, placed_at, updated_at)
            SELECT placed.*, placed.placed_at
            FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[],
                        $8::jsonb[], $9::jsonb[], $10::integer[], $11::timestamptz[])
                AS placed (id, tenant, status, customer_id, currency, total_minor, payment_method,
                           shipping_address, metadata, version, placed_at)
        )
        INSERT INTO order_lines (order_id, number, sku, quantity, unit_price_minor)
        SELECT * FROM unnest($12::uuid[], $13::integer[], $14::text[], $15::integer[], $16::bigint[])
        """,
        [order.id for order in orders],
        [order.tenant for order in orders],
        [order.status for order in orders],
        [order.customer_id for order in orders],
        [order.currency for order in orders],
        [order.total_minor for order in orders],
        [order.payment_method for order in orders],
        [_json(order.shipping_address) for order in orders],
        [_json(order.metadata) for order in orders],
        [order.version for order in orders],
        [order.placed_at for order in orders],
        [order_id for order_id, _, _ in lines],
        [number for _, number, _ in lines],
        [line.sku for _, _, line in lines],
        [line.quantity for _, _, line in lines],
        [line.unit_price_minor for _, _, line in lines],
    )


async def get(pool: db.Pool, tenant: str, order_id: UUID) -> Order:
    """Return one order. Raises OrderNotFound, also for another tenant's order."""
    async with db.connection(pool) as conn:
        order = await load(conn, order_id)
    if order is None or order.tenant != tenant:
        raise OrderNotFound(f"there is no order {order_id}")
    return order


SELECT_LINES = """
    SELECT o.id, o.tenant, o.status, o.status_reason, o.customer_id, o.currency, o.payment_method,
           o.shipping_address, o.metadata, o.tracking_id, o.version, o.placed_at, o.updated_at,
           o.cancel_requested_at, o.cancel_reason, l.sku, l.quantity, l.unit_price_minor
    FROM orders o JOIN order_lines l ON l.order_id = o.id
"""


async def load(conn: db.Connection, order_id: UUID, *, lock: bool = False) -> Order | None:
    """Return one order with its lines, None if there is none. `lock`: hold its row until the transaction ends."""
    return (await load_many(conn, [order_id], lock=lock)).get(order_id)


async def load_many(conn: db.Connection, order_ids: Collection[UUID], *, lock: bool = False) -> dict[UUID, Order]:
    """Return those of the orders that exist. `lock`: hold their rows, in the order of their ids."""
    rows = await conn.fetch(
        f"{SELECT_LINES} WHERE o.id = ANY($1) ORDER BY o.id, l.number {'FOR UPDATE OF o' if lock else ''}",
        list(order_ids),
    )
    return {order.id: order for _, found in groupby(rows, itemgetter("id")) for order in [_order(list(found))]}


def with_status(order: Order, status: Status, reason: Reason | None, tracking_id: str | None = None) -> Order:
    """Return the next version of the order, with this status. `update` sets its time."""
    if not may_become(order.status, status):
        raise AssertionError(f"bug: order {order.id} cannot go from {order.status} to {status}")
    return dataclasses.replace(
        order,
        status=status,
        status_reason=reason,
        tracking_id=tracking_id,
        version=order.version + 1,
    )


async def change_status(
    conn: db.Connection, order: Order, status: Status, reason: Reason | None, trace: Mapping[str, str]
) -> Order:
    """Change the status of an order that the caller has locked, and write the event for it to the outbox."""
    [updated] = await update(conn, [TracedOrder(with_status(order, status, reason), trace)])
    return updated.order


async def update(conn: db.Connection, versions: Sequence[TracedOrder]) -> list[TracedOrder]:
    """Write new versions of orders that the caller has locked, and an event for each version. The last one stays.

    Returns the versions with their time: that of this write, so that it comes after what was written before.
    """
    written = [TracedOrder(_updated_now(version.order), version.trace) for version in versions]
    last = {version.order.id: version.order for version in written}.values()
    if not last:
        return []
    await conn.execute(
        """
        UPDATE orders
        SET status = new.status, status_reason = new.reason, tracking_id = new.tracking_id, version = new.version,
            updated_at = new.updated_at
        FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::timestamptz[])
            AS new (id, status, reason, tracking_id, version, updated_at)
        WHERE orders.id = new.id
        """,
        [order.id for order in last],
        [order.status for order in last],
        [order.status_reason for order in last],
        [order.tracking_id for order in last],
        [order.version for order in last],
        [order.updated_at for order in last],
    )
    await _emit(conn, written)
    return written


def _updated_now(order: Order) -> Order:
    return dataclasses.replace(order, updated_at=max(datetime.now(UTC), order.updated_at))


async def request_cancel(conn: db.Connection, order: Order, reason: Reason) -> Order:
    """Ask the saga of an order that the caller has locked to compensate. Only the first request is stored."""
    if order.cancel_requested_at is not None:
        return order
    query = """
        UPDATE orders SET cancel_requested_at = clock_timestamp(), cancel_reason = $2
        WHERE id = $1 RETURNING cancel_requested_at
    """
    at = await conn.fetchval(query, order.id, reason)
    return dataclasses.replace(order, cancel_requested_at=at, cancel_reason=reason)


def _order(rows: list[asyncpg.Record]) -> Order:
    row = rows[0]
    return Order(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        status=Status(row["status"]),
        status_reason=Reason(row["status_reason"]) if row["status_reason"] else None,
        customer_id=row["customer_id"],
        currency=row["currency"],
        lines=tuple(Line(line["sku"], line["quantity"], line["unit_price_minor"]) for line in rows),
        payment_method=row["payment_method"],
        shipping_address=_parsed(row["shipping_address"]),
        metadata=_parsed(row["metadata"]),
        tracking_id=row["tracking_id"],
        version=row["version"],
        placed_at=row["placed_at"],
        updated_at=row["updated_at"],
        cancel_requested_at=row["cancel_requested_at"],
        cancel_reason=Reason(row["cancel_reason"] or DEFAULT_CANCEL_REASON) if row["cancel_requested_at"] else None,
    )


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _parsed(value: str | None) -> dict[str, Any] | None:
    return None if value is None else json.loads(value)

"""Queries over many orders: listings, which orders are final, how many are not.

A listing is read by keyset on (placed_at, id), newest first: each page begins after the last position of the page
before. The two columns never change and identify one order. So an order is on at most one page, and every matching
order that existed when the first page was read is on one; orders placed later come before the first page.
"""

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from app import db
from app.orders.model import FINAL, UNFINISHED, Line, Order, Reason, Status
from app.values import immutable

IS_UNFINISHED = f"status IN ({', '.join(repr(str(status)) for status in UNFINISHED)})"


@immutable
class Position:
    """The position right after the order with these values."""

    placed_at: datetime
    id: UUID


@immutable
class Listing:
    """A request for one page: up to `limit` matching orders of the tenant, after a position.

    Both bounds of `placed_at` are exclusive. None: no filter.
    """

    tenant: str
    limit: int
    status: Status | None = None
    customer_id: str | None = None
    placed_after: datetime | None = None
    placed_before: datetime | None = None
    after: Position | None = None


async def page(pool: db.Pool, listing: Listing) -> tuple[list[Order], Position | None]:
    """Read one page, lines included, in one statement. Return its orders and, if there are more, where to continue.

    The orders have no payment method, address and metadata: a listing does not show them, and they may be large.
    """
    async with db.connection(pool) as conn:
        text, values = select(listing)
        # An unnamed statement is planned each time. A generic plan may sort all orders of a customer with a million;
        # planning costs much less than that.
        statement = await conn.prepare(text, name="")
        orders = [_order(row) for row in await statement.fetch(*values)]
    if len(orders) <= listing.limit:
        return orders, None
    last = orders[listing.limit - 1]
    return orders[: listing.limit], Position(last.placed_at, last.id)


def select(listing: Listing) -> tuple[str, list[Any]]:
    """Return the statement that reads the page and one more order, and its values.

    It contains only the filters that are set, and the status as a literal, so the planner can choose the best index;
    `$1 IS NULL OR …` would hide from the planner which filters are set.
    """
    values: list[Any] = []
    conditions = " AND ".join(_conditions(listing, values))
    statement = f"""
        SELECT o.*, l.skus, l.quantities, l.unit_prices_minor
        FROM (
            SELECT id, tenant, status, status_reason, customer_id, currency, tracking_id, version, placed_at, updated_at
            FROM orders WHERE {conditions}
            ORDER BY placed_at DESC, id DESC LIMIT {listing.limit + 1:d}
        ) AS o
        CROSS JOIN LATERAL (
            SELECT array_agg(sku ORDER BY number) AS skus, array_agg(quantity ORDER BY number) AS quantities,
                   array_agg(unit_price_minor ORDER BY number) AS unit_prices_minor
            FROM order_lines WHERE order_id = o.id
        ) AS l
        ORDER BY o.placed_at DESC, o.id DESC
    """  # noqa: S608 - constants, names of statuses, numbers
    return statement, values


def _conditions(listing: Listing, values: list[Any]) -> Iterator[str]:
    def parameter(value: object) -> str:
        values.append(value)
        return f"${len(values)}"

    yield f"tenant = {parameter(listing.tenant)}"
    if listing.status is not None:
        yield f"status = '{listing.status.value}'"
    if listing.customer_id is not None:
        yield f"customer_id = {parameter(listing.customer_id)}"
    if listing.placed_after is not None:
        yield f"placed_at > {parameter(listing.placed_after)}"
    if listing.placed_before is not None:
        yield f"placed_at < {parameter(listing.placed_before)}"
    if listing.after is not None:
        yield f"(placed_at, id) < ({parameter(listing.after.placed_at)}, {parameter(listing.after.id)})"


def _order(row: Any) -> Order:
    return Order(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        status=Status(row["status"]),
        status_reason=Reason(row["status_reason"]) if row["status_reason"] else None,
        customer_id=row["customer_id"],
        currency=row["currency"],
        lines=tuple(
            itertools.starmap(Line, zip(row["skus"], row["quantities"], row["unit_prices_minor"], strict=True))
        ),
        payment_method=None,
        shipping_address=None,
        metadata=None,
        tracking_id=row["tracking_id"],
        version=row["version"],
        placed_at=row["placed_at"],
        updated_at=row["updated_at"],
    )


async def list_tenants(conn: db.Connection, limit: int) -> list[str]:
    """Return up to `limit` tenants that have orders, by name. Each is one lookup in an index."""
    rows = await conn.fetch(
        f"""
        WITH RECURSIVE found (tenant) AS (
            (SELECT tenant FROM orders ORDER BY tenant LIMIT 1)
            UNION ALL
            SELECT (SELECT o.tenant FROM orders o WHERE o.tenant > found.tenant ORDER BY o.tenant LIMIT 1)
            FROM found WHERE found.tenant IS NOT NULL
        )
        SELECT tenant FROM found WHERE tenant IS NOT NULL LIMIT {limit:d}
        """  # noqa: S608 - a number
    )
    return [row["tenant"] for row in rows]


async def ended(conn: db.Connection, ids: Sequence[UUID]) -> list[UUID]:
    """Return which of these orders have a final status."""
    rows = await conn.fetch("SELECT id FROM orders WHERE id = ANY($1) AND status = ANY($2)", ids, sorted(FINAL))
    return [UUID(int=row["id"].int) for row in rows]


async def unfinished(conn: db.Connection) -> dict[Status, int]:
    """Return how many orders of all tenants there are in each status that is not final."""
    rows = await conn.fetch(
        f"""
        SELECT status, count(*) AS orders FROM orders
        WHERE {IS_UNFINISHED} GROUP BY status
        """  # noqa: S608 - names of statuses
    )
    counted = {row["status"]: row["orders"] for row in rows}
    return {status: counted.get(status, 0) for status in UNFINISHED}

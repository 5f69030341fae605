"""The list of orders: filters, pages by keyset, and what went wrong last with each order.

A page begins right after the position of another page's last or first order. It is read by an index, whatever the
filter, so that it costs a few milliseconds with a million orders:

- the orders of one tenant, newest first, by (tenant, placed_at, id), or by that with the customer or the status before;
- with a filter by customer or status and for all tenants, the newest of each tenant, merged;
- of all tenants otherwise, by the primary key: ids are UUIDv7, so their order is that of time;
- the orders that need attention are found by their unfinished sagas and dead letters, which are few.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.orders import money
from app.orders.model import Status, rfc3339
from app.orders.queries import Position, list_tenants
from app.saga import unstarted
from app.saga.queries import STUCK
from app.values import immutable

MAX_TENANTS = 1000  # in a search of all tenants; each is a lookup of about 10 µs
LATEST_ID = timedelta(seconds=10)  # an id is made right after its `placed_at`, unless the process stalls in between


class Attention(StrEnum):
    """Why orders need attention: their saga is stuck or cannot start, or it needs an operator."""

    STUCK = "stuck"
    NEEDS_OPERATOR = "needs_operator"


ATTENTION = {
    Attention.STUCK: f"""
        SELECT s.id FROM sagas s WHERE s.finished_at IS NULL AND {STUCK}
        UNION ALL
        SELECT orders.id FROM {unstarted.DEAD}
    """,  # noqa: S608 - constants
    Attention.NEEDS_OPERATOR: """
        SELECT id FROM sagas WHERE finished_at IS NULL AND needs_operator_at <= clock_timestamp()
    """,
}


@immutable
class OrderFilter:
    """Which orders to list; None: no filter, so without a `tenant` those of all. Both bounds are exclusive."""

    tenant: str | None = None
    status: Status | None = None
    customer_id: str | None = None
    placed_after: datetime | None = None
    placed_before: datetime | None = None
    attention: Attention | None = None

    @property
    def reads_each_tenant(self) -> bool:
        """Return whether the index for this filter begins with the tenant. Confirmed orders, the most, have none."""
        is_rare = self.customer_id is not None or self.status not in (None, Status.CONFIRMED)
        return self.attention is None and (self.tenant is not None or is_rare)


@immutable
class PageQuery:
    """Which page to read: up to `limit` orders older, or newer, than a position; the newest if there is neither."""

    limit: int
    older_than: Position | None = None
    newer_than: Position | None = None

    @property
    def position(self) -> Position | None:
        """The position next to which the page is."""
        return self.older_than or self.newer_than

    @property
    def comparison(self) -> str:
        """How orders of the page compare with the position."""
        return ">" if self.newer_than else "<"

    @property
    def direction(self) -> str:
        """In which direction the page is read, from the position on."""
        return "ASC" if self.newer_than else "DESC"


class LastFailure(BaseModel):
    """The last call to a partner that failed. `outcome`: `refused`, `not-sent` or `unknown`.

    Or why the saga cannot start: `dead-letter` or `purged`, without a step; `attempt`: how often it was tried.
    """

    step: str | None
    action: str | None
    attempt: int
    outcome: str
    detail: str | None


class OrderSummary(BaseModel):
    """An order in a list. `items`: how many lines it has. `last_failure`: null for a confirmed order."""

    order_id: UUID
    tenant: str
    status: str
    status_reason: str | None
    customer_id: str | None
    currency: str
    total: str
    items: int
    placed_at: str
    stuck: bool
    needs_operator: bool
    last_failure: LastFailure | None


@immutable
class OrderPage:
    """A page, newest first. `older`, `newer`: the positions of the pages around it; None: there is none.

    `is_complete`: false if there are more than `MAX_TENANTS` tenants, and the orders of the others were not looked at.
    """

    orders: Sequence[OrderSummary]
    older: Position | None
    newer: Position | None
    is_complete: bool = True


async def read_page(pool: db.Pool, wanted: OrderFilter, query: PageQuery, consumer: str) -> OrderPage:
    """Read one page. `consumer`: the inbox name of the saga's consumer. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        tenants = await tenants_of(conn, wanted.tenant) if wanted.reads_each_tenant else []
        positions = await _read_positions(conn, wanted, query, tenants, consumer)
        if query.newer_than is not None and len(positions) <= query.limit:  # it is the first page
            query = PageQuery(query.limit)
            positions = await _read_positions(conn, wanted, query, tenants, consumer)
        has_more, positions = len(positions) > query.limit, positions[: query.limit]
        if query.newer_than is not None:
            positions.reverse()
        orders = await read_summaries(conn, [position.id for position in positions], consumer)
    return OrderPage(
        orders=orders,
        older=positions[-1] if positions and (has_more or query.newer_than is not None) else None,
        newer=positions[0] if positions and (query.older_than or query.newer_than) else query.older_than,
        is_complete=len(tenants) <= MAX_TENANTS,
    )


async def read_orders(pool: db.Pool, order_ids: Sequence[UUID], consumer: str) -> list[OrderSummary]:
    """Return those of the orders that exist, in this order. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        return await read_summaries(conn, order_ids, consumer)


async def tenants_of(conn: db.Connection, tenant: str | None) -> list[str]:
    """Return the tenants to read: this one, or all. More than `MAX_TENANTS` stand for too many."""
    return [tenant] if tenant is not None else await list_tenants(conn, MAX_TENANTS + 1)


async def _read_positions(
    conn: db.Connection, wanted: OrderFilter, query: PageQuery, tenants: Sequence[str], consumer: str
) -> list[Position]:
    text, values = select(wanted, query, tenants, consumer)
    # An unnamed statement is planned each time, as in `app.orders.queries.page`.
    statement = await conn.prepare(text, name="")
    return [Position(row["placed_at"], UUID(int=row["id"].int)) for row in await statement.fetch(*values)]


def select(wanted: OrderFilter, query: PageQuery, tenants: Sequence[str], consumer: str) -> tuple[str, list[Any]]:
    """Return the statement that reads the positions of a page and of one more order, and its values.

    Newer orders are read oldest first: those next to the position, not the newest.
    """
    if wanted.reads_each_tenant:
        return _select_by_tenant(wanted, query, tenants[:MAX_TENANTS])
    return _select_by_id(wanted, query, consumer)


def _select_by_tenant(wanted: OrderFilter, query: PageQuery, tenants: Sequence[str]) -> tuple[str, list[Any]]:
    values: list[Any] = [tenants]
    conditions = ["o.tenant = listed.tenant", *_filter(wanted, values)]
    if query.position is not None:
        place = f"({_add(query.position.placed_at, values)}, {_add(query.position.id, values)})"
        conditions.append(f"(o.placed_at, o.id) {query.comparison} {place}")
    statement = f"""
        SELECT newest.placed_at, newest.id FROM unnest($1::text[]) AS listed (tenant) CROSS JOIN LATERAL (
            SELECT o.placed_at, o.id FROM orders o WHERE {" AND ".join(conditions)}
            ORDER BY o.placed_at {query.direction}, o.id {query.direction} LIMIT {query.limit + 1:d}
        ) AS newest
        ORDER BY newest.placed_at {query.direction}, newest.id {query.direction} LIMIT {query.limit + 1:d}
    """  # noqa: S608 - constants and numbers
    return statement, values


def _select_by_id(wanted: OrderFilter, query: PageQuery, consumer: str) -> tuple[str, list[Any]]:
    values: list[Any] = [consumer] if wanted.attention is Attention.STUCK else []
    conditions = ["true", *_filter(wanted, values)]
    if wanted.tenant is not None:
        conditions.append(f"o.tenant = {_add(wanted.tenant, values)}")
    if wanted.placed_after is not None:
        conditions.append(f"o.id >= {_add(db.first_id(wanted.placed_after), values)}")
    if wanted.placed_before is not None:
        conditions.append(f"o.id < {_add(db.first_id(wanted.placed_before + LATEST_ID), values)}")
    if query.position is not None:
        conditions.append(f"o.id {query.comparison} {_add(query.position.id, values)}")
    start, source = "", "orders o"
    if wanted.attention is not None:
        # MATERIALIZED and OFFSET 0: with ORDER BY and LIMIT, the planner might walk all orders to find the few.
        start = f"WITH attention AS MATERIALIZED ({ATTENTION[wanted.attention]})"
        source = "attention CROSS JOIN LATERAL (SELECT * FROM orders WHERE orders.id = attention.id OFFSET 0) AS o"
    statement = f"""
        {start} SELECT o.placed_at, o.id FROM {source} WHERE {" AND ".join(conditions)}
        ORDER BY o.id {query.direction} LIMIT {query.limit + 1:d}
    """  # noqa: S608 - constants and a number
    return statement, values


def _filter(wanted: OrderFilter, values: list[Any]) -> Iterator[str]:
    if wanted.status is not None:
        yield f"o.status = '{wanted.status.value}'"  # a literal, so that the planner knows which index fits
    if wanted.customer_id is not None:
        yield f"o.customer_id = {_add(wanted.customer_id, values)}"
    if wanted.placed_after is not None:
        yield f"o.placed_at > {_add(wanted.placed_after, values)}"
    if wanted.placed_before is not None:
        yield f"o.placed_at < {_add(wanted.placed_before, values)}"


def _add(value: object, values: list[Any]) -> str:
    """Add a value, and return its parameter."""
    values.append(value)
    return f"${len(values)}"


# OFFSET 0: with ORDER BY and LIMIT alone, the planner may walk the log of all sagas backward.
SUMMARIES = f"""
    SELECT o.id AS order_id, o.tenant, o.status, o.status_reason, o.customer_id, o.currency, o.total_minor,
           o.placed_at, lines.items,
           dead.message_id IS NOT NULL OR coalesce({STUCK} AND s.finished_at IS NULL, false) AS stuck,
           coalesce(s.needs_operator_at <= clock_timestamp() AND s.finished_at IS NULL, false) AS needs_operator,
           failure.step, failure.action, coalesce(failure.attempt, dead.attempts) AS attempt,
           coalesce(failure.detail, dead.last_error) AS detail,
           coalesce(failure.outcome, CASE WHEN dead.purged_at IS NOT NULL THEN 'purged'
               WHEN dead.message_id IS NOT NULL THEN 'dead-letter' END) AS outcome
    FROM unnest($1::uuid[]) WITH ORDINALITY AS listed (id, place)
    JOIN orders o USING (id)
    CROSS JOIN LATERAL (SELECT count(*) AS items FROM order_lines WHERE order_id = o.id) AS lines
    LEFT JOIN sagas s ON s.id = o.id AND o.status <> 'confirmed'
    LEFT JOIN inbox dead ON o.status = 'pending' AND s.id IS NULL AND dead.consumer = $2
        AND dead.message_id = o.id::text AND dead.dead_at IS NOT NULL AND dead.processed_at IS NULL
    LEFT JOIN LATERAL (
        SELECT * FROM (SELECT * FROM saga_steps WHERE saga_id = s.id OFFSET 0) AS log
        WHERE outcome NOT IN ('attempted', 'done') ORDER BY id DESC LIMIT 1
    ) AS failure ON true
    ORDER BY listed.place
"""  # noqa: S608 - constants


async def read_summaries(conn: db.Connection, order_ids: Sequence[UUID], consumer: str) -> list[OrderSummary]:
    """Return those of the orders that exist, in this order. `consumer`: the inbox name of the saga's consumer."""
    if not order_ids:
        return []
    return [_summarize(row) for row in await conn.fetch(SUMMARIES, order_ids, consumer)]


def _summarize(row: Any) -> OrderSummary:
    failure = {name: row[name] for name in LastFailure.model_fields}
    same = ("tenant", "status", "status_reason", "customer_id", "currency", "items", "stuck", "needs_operator")
    return OrderSummary(
        order_id=UUID(int=row["order_id"].int),
        total=money.from_minor(row["total_minor"], row["currency"]),
        placed_at=rfc3339(row["placed_at"]),
        last_failure=None if row["outcome"] is None else LastFailure(**failure),
        **{name: row[name] for name in same},
    )

"""Find orders by any of their ids: one text, every kind of id that it may be.

A UUID may be an order's id as well as a customer's own key, so every kind is looked for. Each lookup uses an index and
returns few orders. The lookups by customer and by idempotency key need the tenant: for an operator they go through the
tenants, up to `MAX_TENANTS` of them.
"""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any
from uuid import UUID

from app import db
from app.errors import IdempotencyKeyInvalid
from app.idempotency.key import read_key
from app.operations.order_list import MAX_TENANTS, tenants_of
from app.values import immutable

MAX_HITS = 50  # of one kind, the newest
# Callers choose traces, and partners their ids, so one may belong to any number of orders.
MAX_ROWS = 10_000
TRACE = re.compile(r"(?:[0-9a-f]{2}-)?([0-9a-f]{32})(?:-[0-9a-f]{16}-[0-9a-f]{2})?")  # W3C Trace Context, section 3.2


class Kind(StrEnum):
    """What a text was found as."""

    ORDER = "order id"
    CUSTOMER = "customer"
    IDEMPOTENCY_KEY = "idempotency key"
    TRACKING = "tracking id"
    PAYMENT = "payment id"
    TRACE = "trace id"


@immutable
class Lookup:
    """How to find the orders with an id of one kind.

    `parse`: return the id that the text is; None: it cannot be one. `source`: the SQL that selects the `id` of orders
    by `$1`. `by_tenant`: it has the tenants as `$2`. `lives`: for how long the id is known; empty: for good.
    """

    kind: Kind
    parse: Callable[[str], object]
    source: str
    by_tenant: bool = False
    lives: str = ""

    @property
    def statement(self) -> str:
        """Return the statement: one row with `ids`, newest first and one more than `MAX_HITS`, and `is_cut`.

        `is_cut`: `MAX_ROWS` rows were read, and there may be more. `$2`: the tenants whose orders may be found; NULL:
        all. MATERIALIZED, because the planner might walk all orders to merge them with those that were found.
        """
        return f"""
            WITH found AS MATERIALIZED ({self.source} LIMIT {MAX_ROWS})
            SELECT (SELECT count(*) FROM found) = {MAX_ROWS} AS is_cut, ARRAY (
                SELECT found.id FROM found
                WHERE $2::text[] IS NULL OR (SELECT tenant FROM orders WHERE orders.id = found.id) = ANY ($2)
                ORDER BY found.id DESC LIMIT {MAX_HITS + 1}
            ) AS ids
        """  # noqa: S608 - constants


def _parse_order_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _parse_key(text: str) -> str | None:
    try:
        return read_key([text], required=False)
    except IdempotencyKeyInvalid:
        return None


def _parse_trace(text: str) -> str | None:
    match = TRACE.fullmatch(text.lower())
    return None if match is None else match[1]


LOOKUPS = (
    Lookup(Kind.ORDER, _parse_order_id, "SELECT id FROM orders WHERE id = $1"),
    Lookup(
        Kind.CUSTOMER,
        str,
        f"""
        SELECT newest.id FROM unnest($2::text[]) AS listed (tenant) CROSS JOIN LATERAL (
            SELECT id FROM orders WHERE tenant = listed.tenant AND customer_id = $1
            ORDER BY placed_at DESC, id DESC LIMIT {MAX_HITS + 1}
        ) AS newest
        """,  # noqa: S608 - a number
        by_tenant=True,
    ),
    # The location of every stored response is that of its order.
    Lookup(
        Kind.IDEMPOTENCY_KEY,
        _parse_key,
        """
        SELECT right(location, 36)::uuid AS id FROM idempotency_keys
        WHERE tenant = ANY ($2) AND key = $1 AND expires_at > clock_timestamp()
        """,
        by_tenant=True,
        lives="while the key lives",
    ),
    Lookup(Kind.TRACKING, str, "SELECT id FROM orders WHERE tracking_id = $1"),
    Lookup(
        Kind.PAYMENT,
        str,
        "SELECT saga_id AS id FROM saga_steps WHERE reply ->> 'payment_id' = $1",
        lives="while the log of the saga is kept",
    ),
    Lookup(
        Kind.TRACE,
        _parse_trace,
        "SELECT id FROM sagas WHERE substr(traceparent, 4, 32) = $1",
        lives="once the saga has started, and while it is kept",
    ),
)


@immutable
class Found:
    """The orders that were found, newest first, each with what the text is for it.

    `looked_for`: what the text could be. `is_complete`: as for `OrderPage`. `is_cut`: there may be more orders.
    """

    orders: dict[UUID, Sequence[Kind]]
    looked_for: Sequence[Lookup]
    is_complete: bool
    is_cut: bool


async def search(pool: db.Pool, text: str, tenant: str | None) -> Found:
    """Find orders of the tenant by any id; `tenant` None: of all tenants. Raises DatabaseUnavailable."""
    lookups = [(lookup, value) for lookup in LOOKUPS if (value := lookup.parse(text)) is not None]
    found: dict[UUID, list[Kind]] = {}
    is_cut = False
    async with db.connection(pool) as conn:
        tenants = await tenants_of(conn, tenant)
        for lookup, value in lookups:
            allowed = tenants[:MAX_TENANTS] if lookup.by_tenant or tenant is not None else None
            row: Any = await conn.fetchrow(lookup.statement, value, allowed)
            is_cut = is_cut or row["is_cut"] or len(row["ids"]) > MAX_HITS
            for order_id in row["ids"][:MAX_HITS]:
                found.setdefault(UUID(int=order_id.int), []).append(lookup.kind)
    return Found(
        orders={order_id: found[order_id] for order_id in sorted(found, reverse=True)},
        looked_for=[lookup for lookup, _ in lookups],
        is_complete=len(tenants) <= MAX_TENANTS,
        is_cut=is_cut,
    )

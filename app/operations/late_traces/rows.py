"""Claim the late trace of an order, so that it is written once, and read the rows that it is made from.

The claim sets the sampled flag in the stored trace contexts. So whatever happens to the order afterwards, such as the
undo of a saga that needs an operator, or the replay of a dead letter, is traced at once, in the same trace.
"""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from app import db
from app.saga.queries import MAX_STEPS
from app.values import immutable

Row = asyncpg.Record

# The flags are the last two characters of a `traceparent` (W3C Trace Context, section 3.2).
UNSAMPLED = "traceparent LIKE '00-%-00'"
SAMPLED = "left(traceparent, 53) || '01'"

CLAIM_EVENT = f"""
    UPDATE outbox SET traceparent = {SAMPLED} WHERE id = $1 AND subject = $1::text AND {UNSAMPLED}
    RETURNING id, type, tenant, occurred_at, pending_since, attempts, traceparent, tracestate, last_error,
              coalesce(first_published_at, published_at, parked_at) AS left_at, parked_at
"""  # noqa: S608 - constants
CLAIM_SAGA = f"""
    UPDATE sagas SET traceparent = {SAMPLED}, traced_at = clock_timestamp()
    WHERE id = $1 AND traced_at IS NULL AND {UNSAMPLED}
    RETURNING id, direction, reason, started_at, finished_at, compensating_at, deadline_at, traceparent, tracestate,
              clock_timestamp() AS now
"""  # noqa: S608 - constants
ORDER = "SELECT id, tenant, status, status_reason, placed_at FROM orders WHERE id = $1"
INBOX = """
    SELECT attempts, first_failure_at, last_failure_at, last_error, processed_at, dead_at
    FROM inbox WHERE consumer = $1 AND message_id = $2
"""
# The newest ones: more spans than the exporter's queue holds would be dropped anyway.
STEPS = f"""
    SELECT * FROM (
        SELECT id, at, coalesce(started_at, at) AS started_at, step, action, attempt, outcome, detail
        FROM saga_steps WHERE saga_id = $1 AND outcome <> 'attempted' ORDER BY id DESC LIMIT {MAX_STEPS:d}
    ) AS newest ORDER BY id
"""  # noqa: S608 - a number


@immutable
class OrderRows:
    """The rows of an order. `event`: its `order.placed`, `saga`: its saga; each None if it was claimed before."""

    order: Row
    event: Row | None
    inbox: Row | None
    saga: Row | None
    steps: Sequence[Row]

    @property
    def trace(self) -> dict[str, str | None]:
        """Return the trace context of the order's request, as headers."""
        row = self.event or self.saga
        assert row is not None  # noqa: S101 - bug: `claim` returns what it has claimed
        return {name: row[name] for name in ("traceparent", "tracestate")}


async def claim(pool: db.Pool, order_id: UUID, consumer: str) -> OrderRows | None:
    """Claim the trace of the order and return its rows; None if there is nothing that is not written yet.

    `consumer`: the one that starts sagas. Raises DatabaseUnavailable.
    """
    async with db.transaction(pool) as conn:
        event = await conn.fetchrow(CLAIM_EVENT, order_id)  # `order.placed` has the order's id
        saga = await conn.fetchrow(CLAIM_SAGA, order_id)
        order = await conn.fetchrow(ORDER, order_id)
        if order is None or (event is None and saga is None):
            return None
        return OrderRows(
            order=order,
            event=event,
            inbox=await conn.fetchrow(INBOX, consumer, str(order_id)),
            saga=saga,
            steps=[] if saga is None else await conn.fetch(STEPS, order_id),
        )

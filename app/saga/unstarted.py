"""Find orders whose saga cannot start because their `order.placed` was dead-lettered, purged or lost.

The inbox records that a message is dead; only the transport knows whether its dead letter still exists.
"""

from collections.abc import Collection
from datetime import datetime
from uuid import UUID

from app import db
from app.values import immutable

# `order.placed` has the id of its order. The index of dead rows is small; the other lookups use primary keys.
DEAD = """
    inbox JOIN orders ON orders.id = inbox.message_id::uuid
    WHERE inbox.consumer = $1 AND inbox.dead_at IS NOT NULL AND inbox.processed_at IS NULL
      AND orders.status = 'pending' AND (SELECT sagas.id FROM sagas WHERE sagas.id = orders.id) IS NULL
"""


@immutable
class BlockedOrder:
    """A pending order whose `order.placed` is dead. `purged`: an operator removed the dead letter.

    `since`: when it was purged, or else dead-lettered.
    """

    order_id: UUID
    tenant: str
    purged: bool
    since: datetime
    attempts: int
    last_error: str | None
    age_seconds: float


async def list_blocked(
    conn: db.Connection, consumer: str, limit: int, *, purged_only: bool = False
) -> list[BlockedOrder]:
    """Return up to `limit` blocked orders, the one whose message has been dead longest first."""
    rows = await conn.fetch(
        f"""
        SELECT orders.id AS order_id, orders.tenant, inbox.purged_at IS NOT NULL AS purged,
               coalesce(inbox.purged_at, inbox.dead_at) AS since, inbox.attempts, inbox.last_error,
               extract(epoch FROM clock_timestamp() - orders.placed_at)::float8 AS age_seconds
        FROM {DEAD} AND (inbox.purged_at IS NOT NULL OR NOT $2)
        ORDER BY inbox.dead_at LIMIT {limit:d}
        """,  # noqa: S608 - constants and a number
        consumer,
        purged_only,
    )
    return [BlockedOrder(**{**row, "order_id": UUID(int=row["order_id"].int)}) for row in rows]


async def list_lost(
    conn: db.Connection, consumer: str, waiting: Collection[str], after_seconds: float, limit: int
) -> list[UUID]:
    """Return up to `limit` blocked orders whose dead letter is not among the ids in `waiting`.

    Skip events that an operator purged, that were dead-lettered less than `after_seconds` ago (the dead letter may
    still be on its way), or that are not due for a resend (see `outbox.republish`). Locks the inbox rows until the
    caller's transaction ends.
    """
    rows = await conn.fetch(
        f"""
        SELECT orders.id FROM outbox, {DEAD}
          AND outbox.id = orders.id AND inbox.purged_at IS NULL
          AND inbox.dead_at <= clock_timestamp() - make_interval(secs => $3)
          AND outbox.published_at <= clock_timestamp() - make_interval(secs => $3 * 2 ^ least(outbox.resends, 20))
          AND NOT EXISTS (SELECT FROM unnest($2::text[]) AS waiting (id) WHERE waiting.id = inbox.message_id)
        ORDER BY inbox.dead_at LIMIT {limit:d} FOR UPDATE OF inbox SKIP LOCKED
        """,  # noqa: S608 - constants and a number
        consumer,
        list(waiting),
        after_seconds,
    )
    return [UUID(int=row["id"].int) for row in rows]

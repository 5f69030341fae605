"""The outbox, for operators: count rows, list them, make a parked row pending again. The last is recorded.

HTTP and CLI return the same views: messages and their state, never order contents.
"""

from typing import Literal, Self
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.errors import ParkedRowNotFound
from app.messaging import outbox_admin
from app.operations import audit
from app.operations.audit import AuditActor
from app.operations.dead_letters import as_uuid
from app.orders.model import rfc3339

ACTION = "outbox requeue"
PENDING = "pending"  # the outcome: the relay will claim the row


class OutboxCounts(BaseModel):
    """How many rows wait in the outbox. The age is in seconds, 0 if no row is pending."""

    pending: int
    oldest_pending_age_seconds: float
    parked: int


class OutboxRow(BaseModel):
    """One unpublished event. `reason`: the broker's last error, or the event it waits for; null: neither.

    `state`: `parked` until an operator decides; `claimed` by a relay, or `waiting`, until `next_attempt_at`.
    """

    id: str
    type: str
    order_id: str
    sequence: int
    tenant: str
    state: Literal["waiting", "claimed", "parked"]
    reason: str | None
    attempts: int
    occurred_at: str
    next_attempt_at: str | None
    parked_at: str | None

    @classmethod
    def of(cls, row: outbox_admin.UnpublishedRow) -> Self:
        """Return the view of a row."""
        reason = row.last_error
        if reason is None and row.waits_for is not None:
            reason = f"waits for sequence {row.waits_for} of the same order"
        return cls(
            id=str(row.id),
            type=row.type,
            order_id=row.subject,
            sequence=row.sequence,
            tenant=row.tenant,
            state="parked" if row.parked_at else "claimed" if row.claimed else "waiting",
            reason=reason,
            attempts=row.attempts,
            occurred_at=rfc3339(row.occurred_at),
            next_attempt_at=None if row.parked_at else rfc3339(row.next_attempt_at),
            parked_at=rfc3339(row.parked_at) if row.parked_at else None,
        )


class OutboxAnswer(OutboxCounts):
    """The outbox: counts, and rows: first parked ones, then those due longest."""

    rows: list[OutboxRow]


class OutboxNow(BaseModel):
    """The outbox for a page that is read again and again: what has not changed reads the same.

    `oldest_pending_at`: since when the oldest pending row waits; null: none is pending.
    """

    pending: int
    oldest_pending_at: str | None
    parked: int
    rows: list[OutboxRow]


async def count(conn: db.Connection) -> OutboxCounts:
    """Count the rows that are not published."""
    pending, age, parked = await outbox_admin.stats(conn)
    return OutboxCounts(pending=pending, oldest_pending_age_seconds=age, parked=parked)


async def read_counts(pool: db.Pool) -> OutboxCounts:
    """Count the rows that are not published. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        return await count(conn)


async def read_rows(pool: db.Pool, limit: int) -> OutboxAnswer:
    """Return the counts and up to `limit` rows. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        counts = await count(conn)
        rows = [OutboxRow.of(row) for row in await outbox_admin.list_unpublished(conn, limit)]
    return OutboxAnswer(**counts.model_dump(), rows=rows)


async def read_now(pool: db.Pool, limit: int, *, parked_only: bool) -> OutboxNow:
    """Return the counts and up to `limit` rows, all or only parked ones. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        counts = await outbox_admin.count_unpublished(conn)
        rows = await outbox_admin.list_unpublished(conn, limit, parked_only=parked_only)
    return OutboxNow(
        pending=counts.pending,
        oldest_pending_at=rfc3339(counts.oldest_pending_at) if counts.oldest_pending_at else None,
        parked=counts.parked,
        rows=[OutboxRow.of(row) for row in rows],
    )


async def requeue(pool: db.Pool, row_id: UUID, actor: AuditActor) -> UUID | None:
    """Make a parked row pending again, with all its attempts. Return its order; None: its subject is none.

    Raises ParkedRowNotFound.
    """
    async with db.transaction(pool) as conn:
        subjects = await outbox_admin.requeue(conn, [row_id])
        if not subjects:
            raise ParkedRowNotFound(f"no parked outbox row has the id {row_id}")
        order_id = as_uuid(subjects[0])
        await audit.record(conn, actor, ACTION, order_id, PENDING, {"id": str(row_id)})
    return order_id


async def requeue_all(pool: db.Pool, limit: int, actor: AuditActor) -> int:
    """Make up to `limit` parked rows pending again, with all their attempts, longest parked first. Return how many."""
    async with db.transaction(pool) as conn:
        requeued = len(await outbox_admin.requeue(conn, await outbox_admin.lock_parked(conn, limit)))
        outcome = PENDING if requeued else audit.NOTHING_MATCHED
        await audit.record(conn, actor, ACTION, None, outcome, {"limit": limit}, {"requeued": requeued})
    return requeued

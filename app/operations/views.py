"""What operators are shown of outbox and dead letters: the same by `/ops` and by the commands' `--json`.

It tells of messages and what became of them, never what is in an order.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel

from app import db
from app.messaging import outbox_admin
from app.operations.dead_letters import Finding, Summary
from app.orders.model import rfc3339


class OutboxCounts(BaseModel):
    """How much the outbox holds. Ages are seconds, 0 where there is nothing."""

    pending: int
    oldest_pending_age_seconds: float
    parked: int

    @classmethod
    async def read(cls, conn: db.Connection) -> Self:
        """Count."""
        pending, age, parked = await outbox_admin.stats(conn)
        return cls(pending=pending, oldest_pending_age_seconds=age, parked=parked)


class OutboxRow(BaseModel):
    """One event that is not out. `reason`: what the broker said last, or what the event waits behind; null: nothing.

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
    def of(cls, row: outbox_admin.Unpublished) -> Self:
        """Show one row."""
        reason = row.last_error
        if reason is None and row.behind is not None:
            reason = f"waits for sequence {row.behind} of the same order"
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
            parked_at=_instant(row.parked_at),
        )


class OutboxAnswer(OutboxCounts):
    """The outbox: counts of all, and the rows that need a look first: parked ones, then those due longest."""

    rows: list[OutboxRow]

    @classmethod
    async def of_first(cls, conn: db.Connection, limit: int) -> Self:
        """Count, and show the first rows."""
        counts = await OutboxCounts.read(conn)
        rows = [OutboxRow.of(row) for row in await outbox_admin.first(conn, limit)]
        return cls(**counts.model_dump(), rows=rows)


class DeadLetterView(BaseModel):
    """A message that was given up. `reason`, `attempts` and times: as it tells itself; null: it does not.

    `inbox`: what the consumer knows of it. `replay`: what sending it again would do.
    """

    id: str
    type: str | None
    order_id: str | None
    tenant: str | None
    reason: str
    attempts: int | None
    first_failure_at: str | None
    last_failure_at: str | None
    inbox: str
    replay: str

    @classmethod
    def of(cls, finding: Finding) -> Self:
        """Show one."""
        letter = finding.letter
        return cls(
            id=letter.id,
            type=letter.type,
            order_id=letter.subject,
            tenant=letter.tenant,
            reason=letter.reason,
            attempts=letter.attempts,
            first_failure_at=_instant(letter.first_failure_at),
            last_failure_at=_instant(letter.last_failure_at),
            inbox=finding.verdict,
            replay=finding.replay,
        )


class DeadLettersAnswer(BaseModel):
    """Dead letters of a queue, the longest there first. `depth`: all there are. `looked_at`: how many of them."""

    queue: str
    depth: int
    looked_at: int
    dead_letters: list[DeadLetterView]

    @classmethod
    def of(cls, queue: str, summary: Summary, findings: Sequence[Finding]) -> Self:
        """Show those that were meant."""
        views = [DeadLetterView.of(each) for each in findings]
        return cls(queue=queue, depth=summary.depth, looked_at=summary.looked_at, dead_letters=views)


class TreatedAnswer(DeadLettersAnswer):
    """What was done, or with `dry_run` would be: to `done` of the `depth` dead letters.

    `from_outbox`: no dead letter has the id that was to be replayed, but its order has not started; so the event is
    sent again from the outbox.
    """

    dry_run: bool
    done: int
    from_outbox: bool

    @classmethod
    def of_pass(cls, queue: str, summary: Summary, findings: Sequence[Finding], *, dry_run: bool) -> Self:
        """Show those that were meant, and what became of them."""
        shown = DeadLettersAnswer.of(queue, summary, findings)
        return cls(
            **dict(shown),
            dry_run=dry_run,
            done=summary.meant,
            from_outbox=summary.from_outbox,
        )


def _instant(instant: datetime | None) -> str | None:
    return rfc3339(instant) if instant else None

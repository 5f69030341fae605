"""The views of dead letters for operators, over HTTP and in the CLI: messages and their state, never order contents."""

from collections.abc import Sequence
from datetime import datetime
from typing import Self

from pydantic import BaseModel

from app import db
from app.messaging import inbox
from app.operations.dead_letters import Finding, Summary
from app.orders.model import rfc3339

COUNTED = 10_000  # a count stops there: beyond it, the exact number tells an operator nothing more


class DeadLetterView(BaseModel):
    """A dead letter. `reason`, `attempts` and times come from the message; null: unknown.

    `inbox`: its state in the consumer's inbox. `replay`: what a replay would do.
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
        """Return the view of a finding."""
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
            inbox=finding.inbox_state,
            replay=finding.replay_effect,
        )


class DeadLettersAnswer(BaseModel):
    """Dead letters of a queue, oldest first. `depth`: how many there are. `looked_at`: how many were scanned."""

    queue: str
    depth: int
    looked_at: int
    dead_letters: list[DeadLetterView]

    @classmethod
    def of(cls, queue: str, summary: Summary, findings: Sequence[Finding]) -> Self:
        """Return the view of the dead letters that matched."""
        views = [DeadLetterView.of(finding) for finding in findings]
        return cls(queue=queue, depth=summary.depth, looked_at=summary.looked_at, dead_letters=views)


class TreatedAnswer(DeadLettersAnswer):
    """The result for `done` of the `depth` dead letters; with `dry_run`, what would have been done.

    `from_outbox`: no dead letter has the id to replay, but its order has not started, so its event is sent again from
    the outbox.
    """

    dry_run: bool
    done: int
    from_outbox: bool

    @classmethod
    def of_scan(cls, queue: str, summary: Summary, findings: Sequence[Finding], *, dry_run: bool) -> Self:
        """Return the view of the dead letters that matched, and of what was done."""
        shown = DeadLettersAnswer.of(queue, summary, findings)
        return cls(
            **dict(shown),
            dry_run=dry_run,
            done=summary.matched,
            from_outbox=summary.from_outbox,
        )


class RecordedDead(BaseModel):
    """What the inbox says of one consumer: how many messages are dead, at most `COUNTED`, and since when the newest is.

    These are fewer than the dead letters if the broker itself or an unreadable message made some, and more if some were
    lost. In contrast to a look at the dead letters, counting them disturbs nothing.
    """

    number: int
    newest_at: str | None


async def read_recorded(pool: db.Pool, consumer: str) -> RecordedDead:
    """Count the messages that the inbox records as dead. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        dead = await inbox.count_dead(conn, consumer, COUNTED)
    return RecordedDead(number=dead.number, newest_at=_instant(dead.newest_at))


def _instant(instant: datetime | None) -> str | None:
    return rfc3339(instant) if instant else None

"""Dead letters without a broker: the parked outbox rows of a queue's event types. Each batch is one transaction."""

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime
from uuid import UUID

from app import db
from app.messaging import inbox, outbox_admin
from app.messaging.dead_letters import DeadLetter
from app.messaging.topology import QueueSpec
from app.values import immutable


@immutable
class OutboxDeadLetters:
    """The parked rows of one queue's event types."""

    pool: db.Pool
    queue: QueueSpec

    async def may_be_scanned_often(self) -> bool:
        """Return True: a scan changes nothing."""
        return True

    @contextlib.asynccontextmanager
    async def scan(self) -> AsyncIterator["_OutboxScan"]:
        """Start a scan of the rows that are parked now."""
        async with db.connection(self.pool) as conn:
            depth, started_at = await outbox_admin.count_parked(conn, self.queue.event_types)
        yield _OutboxScan(self.pool, self.queue, depth, started_at)


class _OutboxScan:
    def __init__(self, pool: db.Pool, queue: QueueSpec, depth: int, started_at: datetime) -> None:
        self.depth = depth
        self._pool = pool
        self._queue = queue
        self._started_at = started_at
        self._last: tuple[datetime, UUID] | None = None
        self._taken = 0

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return the next rows, longest parked first."""
        async with db.connection(self._pool) as conn:
            rows = await outbox_admin.parked(conn, self._queue.event_types, self._started_at, self._last, limit)
            records = await inbox.look_up(conn, self._queue.consumer, [str(row.id) for row in rows])
        letters = []
        for row in rows:
            self._taken += 1
            self._last = (row.parked_at, row.id)
            letters.append(_letter(self._taken, row, records.get(str(row.id))))
        return letters

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Reset the attempts of these messages, and make their rows pending."""
        async with db.transaction(self._pool) as conn:
            await inbox.reset_attempts(conn, self._queue.consumer, [letter.id for letter in letters])
            await outbox_admin.requeue(conn, [UUID(letter.id) for letter in letters])

    async def purge(self, letters: Sequence[DeadLetter], recorded: Collection[str]) -> None:
        """Record these event ids as purged, and mark the rows as published."""
        async with db.transaction(self._pool) as conn:
            await inbox.mark_purged(conn, self._queue.consumer, recorded)
            await outbox_admin.discard(conn, [UUID(letter.id) for letter in letters])


def _letter(number: int, row: outbox_admin.ParkedRow, record: inbox.InboxRecord | None) -> DeadLetter:
    return DeadLetter(
        number=number,
        id=str(row.id),
        event_id=str(row.id),
        type=row.type,
        subject=row.subject,
        tenant=row.tenant,
        reason=row.last_error,
        attempts=record.attempts if record else row.attempts,
        first_failure_at=record.first_failure_at if record else None,
        last_failure_at=row.parked_at,
    )

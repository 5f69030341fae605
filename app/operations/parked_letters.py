"""Where dead letters are without a broker: the parked outbox rows of the types that have a handler."""

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app import db
from app.messaging import inbox, outbox_admin
from app.messaging.rabbitmq.dead_letters import DeadLetter
from app.operations.dead_letters import record_purge


@dataclass(frozen=True, slots=True)
class ParkedRows:
    """Without a broker: the parked outbox rows of the types that have a handler."""

    pool: db.Pool
    consumer: str
    types: Collection[str]

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator["_ParkedPass"]:
        """Begin a pass."""
        async with db.connection(self.pool) as conn:
            depth, began_at = await outbox_admin.count_parked(conn, self.types)
        yield _ParkedPass(self, depth, began_at)


class _ParkedPass:
    def __init__(self, place: ParkedRows, depth: int, began_at: datetime) -> None:
        self.depth = depth
        self._place = place
        self._began_at = began_at
        self._last: tuple[datetime, UUID] | None = None
        self._taken = 0

    async def take(self, limit: int) -> list[DeadLetter]:
        async with db.connection(self._place.pool) as conn:
            rows = await outbox_admin.parked(conn, self._place.types, self._began_at, self._last, limit)
            records = await inbox.look_up(conn, self._place.consumer, [str(row.id) for row in rows])
        letters = []
        for row in rows:
            self._taken += 1
            self._last = (row.parked_at, row.id)
            letters.append(_of_row(self._taken, row, records.get(str(row.id))))
        return letters

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        async with db.transaction(self._place.pool) as conn:
            await inbox.rearm(conn, self._place.consumer, [letter.id for letter in letters])
            await outbox_admin.requeue(conn, [UUID(letter.id) for letter in letters])

    async def purge(self, letters: Sequence[DeadLetter]) -> None:
        events = [UUID(letter.id) for letter in letters]
        async with db.transaction(self._place.pool) as conn:
            await record_purge(conn, self._place.consumer, events)
            await outbox_admin.give_up(conn, events)


def _of_row(number: int, row: outbox_admin.Parked, record: inbox.Record | None) -> DeadLetter:
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

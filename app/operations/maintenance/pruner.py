"""The pruner: deletes rows past their retention.

It works in small batches. Each is a short transaction that skips locked rows and holds few locks. The next batch
continues after it, so rows that must stay are read once per sweep. The cost does not grow with history: ids are ordered
by time, so old rows are at the low end of a primary key. Rows are deleted by the `ctid` at which they were locked, so
the planner has nothing to join, whatever its statistics are.

Postgres's clock, and a time that Postgres wrote, decide whether a row may go. Ids come from the clock of the process
that took the order, and only help to find rows. If that clock was ahead, the id lies in the future. So ids in the
future are scanned too, and a row stays for at most twice its retention.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple
from uuid import UUID

import structlog

from app import db
from app.errors import OrdersError
from app.idempotency import store
from app.messaging import inbox, outbox
from app.observability.signals import Signals
from app.operations.maintenance.facts import PruneFailed, RowsPruned
from app.orders import queries
from app.saga import maintenance
from app.values import immutable

log = structlog.get_logger(__name__)

TABLES = ("outbox", "inbox", "sagas", "idempotency_keys")
BATCH = 500
DUTY_FACTOR = 2.0  # pause this many times as long as a batch took, so that a busy disk serves requests first
LOCK_SECONDS = 1.0  # locked rows are skipped; this limits the wait for a migration that locks the table
PERIOD_SECONDS = 60.0
START, END = UUID(int=0), UUID(int=2**128 - 1)
AHEAD = timedelta(minutes=1)  # ids further in the future come from a wrong clock

Prune = Callable[[db.Connection, UUID, UUID], Awaitable[tuple[int, UUID | None]]]  # deletes between two ids


@immutable
class PrunerConfig:
    """For how long rows are kept. `consumers`: the names of those whose inboxes are pruned."""

    consumers: Sequence[str]
    outbox_retention_seconds: float
    inbox_retention_seconds: float
    saga_retention_seconds: float


class PrunedBatch(NamedTuple):
    """How many rows of a table were deleted, or the error that ended the table's part of a sweep."""

    table: str
    removed: int
    error: Exception | None = None


class Pruner:
    """Deletes rows past their retention."""

    def __init__(self, pool: db.Pool, config: PrunerConfig, signals: Signals) -> None:
        self._pool = pool
        self._signals = signals
        self._retention_seconds = {
            "outbox": config.outbox_retention_seconds,
            "inbox": config.inbox_retention_seconds,
            "sagas": config.saga_retention_seconds,
        }
        published = partial(
            outbox.prune,
            limit=BATCH,
            retention_seconds=config.outbox_retention_seconds,
            select_finished=_select_finished,
        )
        processed = partial(inbox.prune, limit=BATCH, retention_seconds=config.inbox_retention_seconds)
        finished = partial(maintenance.prune, limit=BATCH, retention_seconds=config.saga_retention_seconds)
        self.prunes: Sequence[tuple[str, Prune]] = (
            ("outbox", published),
            *(("inbox", partial(processed, consumer=consumer)) for consumer in config.consumers),
            ("sagas", finished),
            ("idempotency_keys", _prune_keys),
        )
        self._sweep = self.sweep()

    async def sweep(self) -> AsyncIterator[PrunedBatch]:
        """Sweep all tables once, and yield after each batch. An error in one table does not stop the others."""
        for table, prune in self.prunes:
            try:
                async for removed in self._sweep_table(table, prune):
                    yield PrunedBatch(table, removed)
            except Exception as error:
                if isinstance(error, OrdersError):
                    log.warning("janitor.failed", table=table, code=error.code, error=str(error))
                else:
                    log.exception("janitor.failed", table=table)
                self._signals.emit(PruneFailed(table))
                yield PrunedBatch(table, 0, error)

    async def run_once(self) -> int:
        """Prune the next batch. Returns 0 at the end of a sweep."""
        async for _ in self._sweep:
            return 1
        self._sweep = self.sweep()
        return 0

    async def _sweep_table(self, table: str, prune: Prune) -> AsyncIterator[int]:
        for start, before in await self._ranges(table):
            after: UUID | None = start
            while after is not None:
                started_at = time.monotonic()
                async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
                    removed, after = await prune(conn, after, before)
                if after is not None:
                    await asyncio.sleep((time.monotonic() - started_at) * DUTY_FACTOR)
                self._signals.emit(RowsPruned(table, removed))
                yield removed

    async def _ranges(self, table: str) -> list[tuple[UUID, UUID]]:
        """Return the id ranges of old rows: the past, and the future, where only a wrong clock puts ids."""
        if table not in self._retention_seconds:
            return [(START, END)]
        async with db.connection(self._pool) as conn:
            now = await db.now(conn)
        old = now - timedelta(seconds=self._retention_seconds[table])
        return [(START, db.first_id(old)), (db.first_id(now + AHEAD), END)]


async def _select_finished(conn: db.Connection, subjects: Collection[str]) -> set[str]:
    return {str(order_id) for order_id in await queries.ended(conn, [UUID(subject) for subject in subjects])}


async def _prune_keys(conn: db.Connection, after: UUID, _before: UUID) -> tuple[int, UUID | None]:
    """Delete expired keys. None of them has to stay, so each batch starts at the same id."""
    removed = await store.prune(conn, BATCH)
    return removed, after if removed == BATCH else None

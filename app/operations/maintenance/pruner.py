"""The janitor: sends again what seems lost, and removes what has served its time.

Everything goes in small batches, each a short transaction that waits for nobody's row and holds few; where one ends,
the next goes on, so rows that have to stay are looked at once in a pass. No look grows with history: old rows are at
the low end of a primary key, since ids are ordered by time, and pending orders have a partial index. Rows are deleted
where they were found and locked (`ctid`), so the planner has nothing to join, whatever it believes of the tables.

Whether a row may go is decided on Postgres's clock, by a time that Postgres wrote. Ids are made on the clock of the
process that took the order, and only help to find the row. If that clock was ahead, the id is that of a younger row or
even of none yet: so ids from the future are looked at too, and a row stays for at most twice its retention.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import timedelta
from functools import partial
from typing import NamedTuple
from uuid import UUID

import structlog

from app import db
from app.errors import OrdersError
from app.idempotency import store
from app.messaging import inbox, outbox
from app.observability.metrics import Metrics
from app.orders import queries
from app.saga import maintenance

log = structlog.get_logger(__name__)

BATCH = 500
REST = 2.0  # times as long as a batch took: a busy disk is left to those who are waited for
LOCK_SECONDS = 1.0  # rows in use are skipped; this is for a migration that has a whole table
SWEEP_PERIOD_SECONDS = 60.0
RESEND_PERIOD_SECONDS = 10.0
RESEND_REST = 9.0  # times as long as a look took: in an outage of the broker there may be a million orders to look at
FEW_WAITING = 100  # messages that wait for the consumer
RESEND_AFTER_SECONDS = 60.0  # of a placed order's event that started nothing; doubles with each resend
START, END = UUID(int=0), UUID(int=2**128 - 1)
AHEAD = timedelta(minutes=1)  # of Postgres's clock: ids from further in the future are made by a wrong clock

Depths = Callable[[], Awaitable[tuple[int, int]]]  # how many messages wait for the consumer; how many are dead letters
Prune = Callable[[db.Connection, UUID, UUID], Awaitable[tuple[int, UUID | None]]]  # between two ids


class Resender:
    """Has the event of a placed order sent again when its saga did not start, though a broker confirmed the event.

    Brokers lose confirmed messages: a disk, a forced failover, a purge by hand. A resend that was not needed does no
    harm, since the inbox knows the id; but while many messages wait for the consumer, the event is most likely among
    them, and copies would only put it further behind. A dead letter is not lost: an operator decides about it
    (`lost_letters` finds those that are).
    """

    def __init__(
        self, pool: db.Pool, metrics: Metrics, consumer: str, depths: Depths, wake_relay: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._consumer = consumer
        self._depths = depths
        self._wake_relay = wake_relay
        self._after = maintenance.FIRST
        self._found = 0

    async def run_once(self) -> int:
        """Look at one batch of pending orders; 0 when it was the last one. Raises BrokerUnavailable, as of `depths`."""
        began = time.monotonic()
        async with db.connection(self._pool) as conn:
            unstarted, after = await maintenance.unstarted(conn, self._after, BATCH, RESEND_AFTER_SECONDS)
        if unstarted and (await self._depths())[0] <= FEW_WAITING:
            await self._resend(unstarted)
        self._found += len(unstarted)  # last: `depths` may raise, and then this batch is read again
        if after is None:
            self._metrics.orders_unstarted.set(self._found)
            self._after, self._found = maintenance.FIRST, 0
            return 0
        self._after = after
        await asyncio.sleep((time.monotonic() - began) * RESEND_REST)
        return 1

    async def _resend(self, unstarted: Collection[UUID]) -> None:
        async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
            dead = await inbox.dead_letters(conn, self._consumer, unstarted)
            # `order.placed` has the id of its order.
            resent = await outbox.repend(conn, set(unstarted) - dead, RESEND_AFTER_SECONDS)
        for order_id in resent:
            log.warning("janitor.resent", order_id=str(order_id))
        if resent:
            self._metrics.outbox_resent.inc(len(resent))
            self._wake_relay()


class Batch(NamedTuple):
    """How many rows were removed from a table; or the error that ended the table's part of a pass."""

    table: str
    removed: int
    error: Exception | None = None


class Janitor:
    """Removes rows past their retention. `consumer`: whose inbox it looks after."""

    def __init__(
        self,
        pool: db.Pool,
        metrics: Metrics,
        consumer: str,
        *,
        outbox_retention_seconds: float,
        inbox_retention_seconds: float,
        saga_retention_seconds: float,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._retention_seconds = {
            "outbox": outbox_retention_seconds,
            "inbox": inbox_retention_seconds,
            "sagas": saga_retention_seconds,
        }
        self.prunes: dict[str, Prune] = {
            "outbox": partial(outbox.prune, limit=BATCH, retention_seconds=outbox_retention_seconds, ended=_ended),
            "inbox": partial(inbox.prune, limit=BATCH, retention_seconds=inbox_retention_seconds, consumer=consumer),
            "sagas": partial(maintenance.prune, limit=BATCH, retention_seconds=saga_retention_seconds),
            "idempotency_keys": _prune_keys,
        }
        self._pass = self.sweep()

    async def sweep(self) -> AsyncIterator[Batch]:
        """Make one pass, yielding after each batch. An error of one table leaves the others to be pruned."""
        for table in self.prunes:
            try:
                async for removed in self._sweep_table(table):
                    yield Batch(table, removed)
            except Exception as error:
                if isinstance(error, OrdersError):
                    log.warning("janitor.failed", table=table, code=error.code, error=str(error))
                else:
                    log.exception("janitor.failed", table=table)
                self._metrics.prune_failed.labels(table).inc()
                yield Batch(table, 0, error)

    async def run_once(self) -> int:
        """Do the next batch; 0 at the end of a pass."""
        async for _ in self._pass:
            return 1
        self._pass = self.sweep()
        return 0

    async def _sweep_table(self, table: str) -> AsyncIterator[int]:
        for start, before in await self._ranges(table):
            after: UUID | None = start
            while after is not None:
                began = time.monotonic()
                async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
                    removed, after = await self.prunes[table](conn, after, before)
                if after is not None:
                    await asyncio.sleep((time.monotonic() - began) * REST)
                self._metrics.pruned.labels(table).inc(removed)
                yield removed

    async def _ranges(self, table: str) -> list[tuple[UUID, UUID]]:
        """Return where ids of old rows are: in the past, and in the future, where only a wrong clock puts them."""
        if table not in self._retention_seconds:
            return [(START, END)]
        async with db.connection(self._pool) as conn:
            now = await db.now(conn)
        old = now - timedelta(seconds=self._retention_seconds[table])
        return [(START, db.first_id(old)), (db.first_id(now + AHEAD), END)]


async def _ended(conn: db.Connection, subjects: Collection[str]) -> set[str]:
    return {str(order_id) for order_id in await queries.ended(conn, [UUID(subject) for subject in subjects])}


async def _prune_keys(conn: db.Connection, after: UUID, _before: UUID) -> tuple[int, UUID | None]:
    """Nothing expired has to stay, so each batch begins where the last one did."""
    removed = await store.prune(conn, BATCH)
    return removed, after if removed == BATCH else None

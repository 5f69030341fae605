"""The janitor: sends again what seems lost, and removes what has served its time.

Everything goes in small batches, each a short transaction that waits for nobody's row and holds few; where one ends,
the next goes on, so rows that have to stay are looked at once in a pass. No look grows with history: old rows are at
the low end of a primary key, since ids are ordered by time, and pending orders have a partial index. Rows are deleted
where they were found and locked (`ctid`), so the planner has nothing to join, whatever it believes of the tables.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from uuid import UUID

import structlog

from app import db
from app.messaging import inbox, outbox
from app.orders import keys, reading
from app.saga import upkeep
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

BATCH = 500
REST = 2.0  # times as long as a batch took: a busy disk is left to those who are waited for
LOCK_SECONDS = 1.0  # rows in use are skipped; this is for a migration that has a whole table
SWEEP_PERIOD_SECONDS = 60.0
RESEND_PERIOD_SECONDS = 10.0
RESEND_REST = 9.0  # times as long as a look took: in an outage of the broker there may be a million orders to look at
FEW_WAITING = 100  # messages that wait for the consumer
RESEND_AFTER_SECONDS = 60.0  # of a placed order's event that started nothing; doubles with each resend
START = UUID(int=0)

Depths = Callable[[], Awaitable[tuple[int, int]]]  # how many messages wait for the consumer; how many are dead letters
Prune = Callable[[db.Connection, UUID], Awaitable[tuple[int, UUID | None]]]


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
        self._after = upkeep.FIRST
        self._found = 0

    async def run_once(self) -> int:
        """Look at one batch of pending orders; 0 when it was the last one. Raises BrokerUnavailable, as of `depths`."""
        began = time.monotonic()
        async with db.connection(self._pool) as conn:
            unstarted, after = await upkeep.unstarted(conn, self._after, BATCH, RESEND_AFTER_SECONDS)
        if unstarted and (await self._depths())[0] <= FEW_WAITING:
            await self._resend(unstarted)
        self._found += len(unstarted)  # last: `depths` may raise, and then this batch is read again
        if after is None:
            self._metrics.orders_unstarted.set(self._found)
            self._after, self._found = upkeep.FIRST, 0
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
        self.prunes: dict[str, Prune] = {
            "outbox": partial(outbox.prune, limit=BATCH, retention_seconds=outbox_retention_seconds, ended=_ended),
            "inbox": partial(inbox.prune, limit=BATCH, retention_seconds=inbox_retention_seconds, consumer=consumer),
            "sagas": partial(upkeep.prune, limit=BATCH, retention_seconds=saga_retention_seconds),
            "idempotency_keys": _prune_keys,
        }
        self._pass = self.sweep()

    async def sweep(self) -> AsyncIterator[tuple[str, int]]:
        """Make one pass, yielding after each batch: the table, and how many rows were removed from it."""
        for table, prune in self.prunes.items():
            after: UUID | None = START
            while after is not None:
                began = time.monotonic()
                async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
                    removed, after = await prune(conn, after)
                if after is not None:
                    await asyncio.sleep((time.monotonic() - began) * REST)
                self._metrics.pruned.labels(table).inc(removed)
                yield table, removed

    async def run_once(self) -> int:
        """Do the next batch; 0 at the end of a pass. A pass that failed begins again from its start."""
        async for _ in self._pass:
            return 1
        self._pass = self.sweep()
        return 0


async def _ended(conn: db.Connection, subjects: Collection[str]) -> set[str]:
    return {str(order_id) for order_id in await reading.ended(conn, [UUID(subject) for subject in subjects])}


async def _prune_keys(conn: db.Connection, after: UUID) -> tuple[int, UUID | None]:
    """Nothing expired has to stay, so each batch begins where the last one did."""
    removed = await keys.prune(conn, BATCH)
    return removed, after if removed == BATCH else None

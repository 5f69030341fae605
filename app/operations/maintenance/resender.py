"""The resender: resends an `order.placed` that the broker confirmed, but whose saga did not start.

Brokers can lose confirmed messages: a disk fails, a failover is forced, someone purges a queue. An unneeded resend is
harmless, because the inbox knows the id. But while many messages wait for the consumer, the event is probably among
them, and copies would only delay it. Dead letters are not resent: they wait for an operator. (`lost_letters` handles
dead letters that the broker lost.)

The cost does not grow with history: pending orders have a partial index, and each batch continues after the last.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from uuid import UUID

import structlog

from app import db
from app.errors import BrokerUnavailable
from app.messaging import inbox, outbox
from app.messaging.facts import EventsResent
from app.observability.signals import Signals
from app.operations.maintenance.facts import UnstartedMeasured
from app.saga import maintenance

log = structlog.get_logger(__name__)

BATCH = 500
LOCK_SECONDS = 1.0  # locked rows are skipped; this limits the wait for a migration that locks the table
PERIOD_SECONDS = 10.0
DUTY_FACTOR = 9.0  # pause this many times as long as a batch took: an outage may leave a million orders to check
FEW_WAITING = 100  # messages that wait for the consumer
RESEND_AFTER_SECONDS = 60.0  # after publishing; doubles with each resend

ReadDepth = Callable[[], Awaitable[tuple[int, int]]]  # messages that wait for the consumer, and dead letters


class Resender:
    """Resends events of orders that have not started. `consumer`: the inbox name of the saga's consumer."""

    def __init__(self, pool: db.Pool, consumer: str, read_depth: ReadDepth, signals: Signals) -> None:
        self._pool = pool
        self._consumer = consumer
        self._read_depth = read_depth
        self._signals = signals
        self._after = maintenance.FIRST
        self._found = 0

    async def run_once(self) -> int:
        """Check one batch of pending orders. Returns 0 after the last one. Raises DatabaseUnavailable."""
        started_at = time.monotonic()
        async with db.connection(self._pool) as conn:
            unstarted, after = await maintenance.scan_unstarted(conn, self._after, BATCH, RESEND_AFTER_SECONDS)
        looked_for = time.monotonic() - started_at
        if unstarted and await self._may_resend():
            await self._resend(unstarted)
        self._found += len(unstarted)  # last: after an error this batch is read again
        if after is None:
            self._signals.emit(UnstartedMeasured(self._found))
            self._after, self._found = maintenance.FIRST, 0
            return 0
        self._after = after
        await asyncio.sleep(looked_for * DUTY_FACTOR)
        return 1

    async def _may_resend(self) -> bool:
        """Return whether few messages wait for the consumer; False while the broker is unavailable."""
        try:
            waiting, _ = await self._read_depth()
        except BrokerUnavailable as error:
            log.warning("resender.waits", error=str(error))
            return False
        return waiting <= FEW_WAITING

    async def _resend(self, unstarted: Collection[UUID]) -> None:
        async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
            dead = await inbox.dead_letters(conn, self._consumer, unstarted)
            # `order.placed` has the id of its order.
            resent = await outbox.republish(conn, set(unstarted) - dead, RESEND_AFTER_SECONDS)
        for order_id in resent:
            log.warning("janitor.resent", order_id=str(order_id))
        if resent:
            self._signals.emit(EventsResent(len(resent)))

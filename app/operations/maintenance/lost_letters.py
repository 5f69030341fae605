"""Find dead letters that the broker lost, and resend their events.

Dead letters can be lost like other messages: someone purges the queue in RabbitMQ's UI, or a disk fails. Their orders
would stay pending forever, because the resender skips every event that is dead in the inbox. A purge by our own command
or route is recorded in the inbox (`purged_at`), and its event is not resent.

Only a scan of all dead letters proves that one is missing, and each scan counts as a delivery of all of them. So scans
run only while some event is due for a resend, and the pause doubles while they find all such events. A queue that an
older release declared may have a low delivery limit, and is never scanned automatically. One scan is not enough: the
broker does not count messages that another connection holds, and these return shortly after that connection closes.
An event is lost if two complete scans in a row did not find it.
"""

import random
import time
from uuid import UUID

import structlog

from app import db
from app.errors import DeadLettersBusy
from app.messaging import inbox, outbox
from app.messaging.facts import EventsResent
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection
from app.operations.maintenance.resender import BATCH, LOCK_SECONDS, RESEND_AFTER_SECONDS
from app.saga import unstarted

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
PAUSE_SECONDS = 10.0  # before the second scan
MAX_PAUSE_SECONDS = 3600.0
ADVICE = "its dead-letter queue has the arguments of an older release: delete it, empty, and it is declared anew"


class LostLetters:
    """Finds lost dead letters, and makes their events pending again."""

    def __init__(
        self,
        letters: DeadLetters,
        signals: Signals,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._pool = letters.pool
        self._letters = letters
        self._signals = signals
        self._first_pause = self._pause = pause_seconds
        self._scan_at = 0.0
        self._found: frozenset[str] | None = None  # by the previous scan; None: it was not complete
        self._is_reported = False  # the log already says that this queue may not be scanned

    async def run_once(self) -> int:
        """Scan once if the pause is over and some event is due. Returns how many events were made pending.

        Raises BrokerUnavailable and DatabaseUnavailable.
        """
        if time.monotonic() < self._scan_at:
            return 0
        resent, pause = 0, self._first_pause
        before, self._found = self._found, None
        if await self._is_missing(frozenset()):
            found = self._found = await self._scan()
            if found is None or not await self._is_missing(found):
                pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
            elif before is not None:
                resent = await self._resend(found | before)
        self._pause = pause
        # Jitter keeps the scans of several processes apart: two at once would each see only some messages.
        self._scan_at = time.monotonic() + pause * (1 - random.random() / 2)  # noqa: S311 - spreading needs no secrecy
        return resent

    async def _scan(self) -> frozenset[str] | None:
        """Return the ids of all dead letters; None if the scan was not complete."""
        if not await self._letters.source.may_be_scanned_often():
            if not self._is_reported:
                log.warning("janitor.dead_letters_not_scanned", queue=self._letters.queue.name, advice=ADVICE)
            self._is_reported = True
            return None
        ids: set[str] = set()

        def found(finding: Finding) -> None:
            ids.add(finding.letter.event_id or finding.letter.id)

        try:
            summary = await self._letters.scan(DeadLetterAction.PEEK, Selection(), found)
        except DeadLettersBusy:
            return None
        if summary.looked_at < summary.depth:
            log.warning("janitor.scan_incomplete", looked_at=summary.looked_at, depth=summary.depth)
            return None
        return frozenset(ids)

    async def _is_missing(self, found: frozenset[str]) -> bool:
        async with db.connection(self._pool) as conn:
            return bool(await unstarted.list_lost(conn, self._letters.queue.consumer, found, RESEND_AFTER_SECONDS, 1))

    async def _resend(self, found: frozenset[str]) -> int:
        resent: list[UUID] = []
        while batch := await self._resend_batch(found):
            resent += batch
        if resent:
            self._signals.emit(EventsResent(len(resent)))
        return len(resent)

    async def _resend_batch(self, found: frozenset[str]) -> list[UUID]:
        """Reset the attempts and make the rows pending in one transaction."""
        consumer = self._letters.queue.consumer
        async with db.transaction(self._pool, lock_seconds=LOCK_SECONDS) as conn:
            lost = await unstarted.list_lost(conn, consumer, found, RESEND_AFTER_SECONDS, BATCH)
            resent = await outbox.republish(conn, lost, RESEND_AFTER_SECONDS)
            await inbox.reset_attempts(conn, consumer, [str(order_id) for order_id in resent])
        for order_id in resent:
            log.warning("janitor.resent_lost_dead_letter", order_id=str(order_id))
        return resent

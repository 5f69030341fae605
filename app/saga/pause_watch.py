"""Keep what a process knows about the pauses of partners up to date, and release the sagas of an ended pause."""

import structlog

from app import db
from app.observability.signals import Signals
from app.saga import pauses
from app.saga.facts import SagaDue
from app.saga.gateway import LOOK_AGAIN_SECONDS, VISITS_PER_SECOND
from app.saga.pauses import PartnerPauses
from app.saga.steps import PLANS, Plans

log = structlog.get_logger(__name__)

BATCH_ROWS = 500  # sagas that one statement releases
# After this time, each saga that waited for a pause has looked again: also the last of 60,000 of one process.
RESUMED_SECONDS = LOOK_AGAIN_SECONDS + 60_000 / VISITS_PER_SECOND
PERIOD_SECONDS = 1.0  # one small statement; a process obeys a pause after this time at most


class PauseWatch:
    """Reads the pauses in force into `known`. `batch_rows`: how many sagas a statement releases."""

    def __init__(
        self,
        pool: db.Pool,
        known: PartnerPauses,
        signals: Signals,
        plans: Plans = PLANS,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self._pool = pool
        self._known = known
        self._signals = signals
        self._plans = plans
        self._batch_rows = batch_rows
        self._ended: set[str] = set()  # partners whose sagas are to be released
        self._ended_before: set[str] = set()  # the same, in the round before

    async def run_once(self) -> int:
        """Read the pauses, and make one batch of the sagas that wait for a pause that has ended due.

        Return how many, if there may be more; else 0. Before each batch the pauses are read anew, so a pause that
        begins during a long release is obeyed, also one of the same partner.

        They are released twice, in two rounds: a runner that decided to wait before the first one may have written its
        saga since, and another process may have noticed the end later. A saga that escapes both looks again at the
        latest when the pause would have ended. The first round also releases those of pauses that an operator ended
        in the last RESUMED_SECONDS: perhaps no process ran.
        """
        is_first = not self._known.known
        async with db.connection(self._pool) as conn:
            remaining = await pauses.read_remaining(conn)
            if is_first:
                self._ended = await pauses.read_resumed(conn, RESUMED_SECONDS)
        for partner in remaining:
            if not self._known.is_paused(partner):
                log.warning("partner.paused", partner=partner, seconds=round(remaining[partner]))
        ended = self._known.update(remaining)
        for partner in ended:
            log.warning("partner.resumed", partner=partner)
        self._ended = (self._ended | ended) - remaining.keys()
        self._ended_before -= remaining.keys()
        released = await self._release_batch(self._ended | self._ended_before)
        if is_first or released:
            self._signals.emit(SagaDue())
        if released == self._batch_rows:
            return released
        self._ended, self._ended_before = set(), self._ended
        return 0

    async def _release_batch(self, partners: set[str]) -> int:
        if not partners:
            return 0
        async with db.connection(self._pool) as conn:
            return await pauses.release(conn, partners, self._batch_rows, self._plans)

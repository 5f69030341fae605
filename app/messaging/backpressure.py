"""Back-pressure: while too many events wait for the broker, intake takes no more orders than it can pass on."""

import time
from collections.abc import Callable

from app import db
from app.errors import OutboxFull
from app.messaging import outbox

PERIOD_SECONDS = 1.0
FASTEST_PER_SECOND = 20_000  # more events than all processes together can write
SHARE = 0.05  # of the time may go into counting


class Backpressure:
    """Counts the outbox now and then, so that a request need not; it may be over the limit by a period's orders.

    Counting a million rows takes a tenth of a second. So it is done only when the room that was left the last time can
    have been filled meanwhile, and never for more than a share of the time.
    """

    def __init__(self, pool: db.Pool, max_pending: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._max_pending = max_pending
        self._clock = clock
        self._full = False
        self._look_at = 0.0

    async def run_once(self) -> int:
        """Count, if it is time. Returns 0: there is nothing more to do before the next period."""
        began = self._clock()
        if began < self._look_at:
            return 0
        async with db.connection(self._pool) as conn:
            pending = await outbox.count_pending(conn, self._max_pending + 1)
        self._full = pending > self._max_pending
        ended = self._clock()
        self._look_at = ended + max((self._max_pending - pending) / FASTEST_PER_SECOND, (ended - began) / SHARE)
        return 0

    def require_room(self) -> None:
        """Raise OutboxFull while there are more than `max_pending` events."""
        if self._full:
            raise OutboxFull(f"more than {self._max_pending} events wait for the broker")

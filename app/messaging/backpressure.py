"""Back-pressure: refuse new orders while too many events wait for the broker."""

import time
from collections.abc import Callable

from app import db
from app.errors import OutboxFull
from app.messaging import outbox

PERIOD_SECONDS = 1.0
FASTEST_PER_SECOND = 20_000  # more events than all processes together can write
SHARE = 0.05  # at most this share of the time is spent on counting


class Backpressure:
    """Counts the outbox periodically, so requests need not. The limit may be exceeded by one period's orders.

    Counting a million rows takes a tenth of a second. So it counts only when new orders can have filled the room that
    the last count found, and spends at most SHARE of the time.
    """

    def __init__(self, pool: db.Pool, max_pending: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._max_pending = max_pending
        self._clock = clock
        self._full = False
        self._count_at = 0.0

    async def run_once(self) -> int:
        """Count, if it is time. Returns 0: there is nothing more to do before the next period."""
        started_at = self._clock()
        if started_at < self._count_at:
            return 0
        async with db.connection(self._pool) as conn:
            pending = await outbox.count_pending(conn, self._max_pending + 1)
        self._full = pending > self._max_pending
        ended_at = self._clock()
        self._count_at = ended_at + max(
            (self._max_pending - pending) / FASTEST_PER_SECOND, (ended_at - started_at) / SHARE
        )
        return 0

    def require_room(self) -> None:
        """Raise OutboxFull while there are more than `max_pending` events."""
        if self._full:
            raise OutboxFull(f"more than {self._max_pending} events wait for the broker")

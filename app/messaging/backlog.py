"""Back-pressure: while too many events wait for the broker, intake takes no more orders than it can pass on."""

from app import db
from app.errors import OutboxFull
from app.messaging import outbox

PERIOD_SECONDS = 1.0


class Backlog:
    """Looks at the outbox once a period, so that a request need not; it may be over the limit by a period's orders."""

    def __init__(self, pool: db.Pool, max_pending: int) -> None:
        self._pool = pool
        self._max_pending = max_pending
        self._full = False

    async def run_once(self) -> int:
        """Look. Returns 0: there is nothing more to do before the next period."""
        async with db.connection(self._pool) as conn:
            self._full = await outbox.holds_more_than(conn, self._max_pending)
        return 0

    def require_room(self) -> None:
        """Raise OutboxFull while there are more than `max_pending` events."""
        if self._full:
            raise OutboxFull(f"more than {self._max_pending} events wait for the broker")

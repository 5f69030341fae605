"""The janitor: removes what has served its time, a little at a time, so that no lock is held long."""

from app import db
from app.orders import keys

BATCH = 1000
PERIOD_SECONDS = 60.0


class Janitor:
    """One pass deletes one batch of expired idempotency keys; the loop comes back at once while there are more."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool

    async def run_once(self) -> int:
        """Return 0 when the pass found less than a batch, so that the loop may rest."""
        async with db.connection(self._pool) as conn:
            pruned = await keys.prune(conn, BATCH)
        return pruned if pruned == BATCH else 0

"""Change rows of a running system, so that a dashboard has something to show."""

import contextlib
from collections.abc import AsyncIterator

from app.db import Pool


async def make_overdue(pool: Pool) -> None:
    """Make unpublished events, unstarted orders and unfinished sagas two minutes older."""
    await pool.execute(
        """
        UPDATE outbox
        SET pending_since = clock_timestamp() - interval '2 min', occurred_at = occurred_at - interval '2 min'
        WHERE published_at IS NULL;
        UPDATE orders SET placed_at = placed_at - interval '2 min' WHERE status = 'pending';
        UPDATE sagas SET next_attempt_at = clock_timestamp() - interval '2 min' WHERE finished_at IS NULL;
        """
    )


async def publish_again(pool: Pool) -> None:
    """Let the relay publish an event that was published, with the same id."""
    await pool.execute(
        "UPDATE outbox SET published_at = NULL, pending_since = clock_timestamp(), next_attempt_at = clock_timestamp()"
        " WHERE id = (SELECT message_id::uuid FROM inbox WHERE processed_at IS NOT NULL LIMIT 1)"
    )


async def leave_dead_tuples(pool: Pool) -> None:
    """Update every row of a hot table many times."""
    for _ in range(20):
        await pool.execute("UPDATE outbox SET attempts = attempts")


@contextlib.asynccontextmanager
async def failing_handler(pool: Pool) -> AsyncIterator[None]:
    """Let no saga start."""
    await pool.execute("ALTER TABLE sagas ADD CONSTRAINT none_starts CHECK (false) NOT VALID")
    yield
    await pool.execute("ALTER TABLE sagas DROP CONSTRAINT none_starts")

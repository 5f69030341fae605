"""Limit concurrent writes to the number of Postgres connections; further writes wait in order.

Waiting here is cheap. Waiting for a connection of the pool has a short limit, which a burst would exceed although
nothing is wrong. When one write finds Postgres down, the waiting ones fail at once.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from app.errors import DatabaseUnavailable, Overloaded

MAX_WAIT_SECONDS = 3.0  # long enough to absorb a burst; after that, fail fast


class ConcurrencyLimit:
    """Lets `slots` writes run at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._failed_at = 0.0

    @contextlib.asynccontextmanager
    async def slot(self, wait_seconds: float) -> AsyncIterator[None]:
        """Wait for a slot, and hold it until the end of the block.

        Raises Overloaded after `wait_seconds`, at most MAX_WAIT_SECONDS; DatabaseUnavailable when another holder found
        Postgres down while this caller waited.
        """
        waiting_since = time.monotonic()
        try:
            async with asyncio.timeout(min(wait_seconds, MAX_WAIT_SECONDS)):
                await self._slots.acquire()
        except TimeoutError as error:
            raise Overloaded("no connection to Postgres became free in time") from error
        try:
            if self._failed_at > waiting_since:
                raise DatabaseUnavailable("postgres was found to be down while this request waited")
            try:
                yield
            except DatabaseUnavailable:
                self._failed_at = time.monotonic()
                raise
        finally:
            self._slots.release()

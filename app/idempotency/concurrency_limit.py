"""The line before Postgres: as many writes as there are connections go on, the others wait their turn.

Waiting here is cheap and in order; waiting for a connection has a short limit instead, which a burst would run into
while nothing is wrong. When Postgres is out, those who came before that was found out are sent home at once.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from app.errors import DatabaseUnavailable, Overloaded

MAX_WAIT_SECONDS = 3.0  # a burst is worked off by then; what is not, is better told so


class Admission:
    """Lets `places` writes go on at a time."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._failed_at = 0.0

    @contextlib.asynccontextmanager
    async def turn(self, wait_seconds: float) -> AsyncIterator[None]:
        """Wait for a place, and keep it.

        Raises Overloaded after `wait_seconds`, MAX_WAIT_SECONDS at most, DatabaseUnavailable for those sent home.
        """
        came = time.monotonic()
        try:
            async with asyncio.timeout(min(wait_seconds, MAX_WAIT_SECONDS)):
                await self._places.acquire()
        except TimeoutError as error:
            raise Overloaded("no connection to Postgres became free in time") from error
        try:
            if self._failed_at > came:
                raise DatabaseUnavailable("postgres was found to be out while this request waited")
            try:
                yield
            except DatabaseUnavailable:
                self._failed_at = time.monotonic()
                raise
        finally:
            self._places.release()

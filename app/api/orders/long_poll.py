"""Requests that wait for an order to end: woken at once by what ends it in this process, by one poll for all else.

A waiter holds no database connection. It takes its place *before* it reads the order, so an end that it does not read
is one that wakes it. Orders that end in other processes, and wake-ups lost with a crash, are found by a poll: one query
a look for all waiters of the process, none while nobody waits.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from uuid import UUID

from app import db
from app.loops import Loop
from app.orders import queries

CAPACITY = 200  # well below the requests that a process serves at a time: who waits must not keep others out
POLL_SECONDS = 0.25  # what an order's end in another process may go unnoticed; a person does not notice it either


class Waiters:
    """Who waits in this process, and for which order. Without a place left, a request is answered at once."""

    def __init__(self, pool: db.Pool, *, capacity: int = CAPACITY, poll_seconds: float = POLL_SECONDS) -> None:
        self._pool = pool
        self._capacity = capacity
        self._loop = Loop("waiters", self.run_once, poll_seconds)
        self._places: dict[UUID, set[asyncio.Event]] = {}
        self._taken = 0
        self._leaving = False

    @contextlib.contextmanager
    def place(self, order_id: UUID) -> Iterator[asyncio.Event | None]:
        """Take a place; its event is set when the order has ended. None: all are taken, or the process is ending."""
        if self._leaving or self._taken >= self._capacity:
            yield None
            return
        ended = asyncio.Event()
        self._taken += 1
        self._places.setdefault(order_id, set()).add(ended)
        try:
            yield ended
        finally:
            self._taken -= 1
            places = self._places[order_id]
            places.discard(ended)
            if not places:
                del self._places[order_id]

    def wake(self, order_id: UUID) -> None:
        """The order has ended, and that is committed."""
        for ended in self._places.get(order_id, ()):
            ended.set()

    def leave(self) -> None:
        """The process is ending: let everybody be answered now, and nobody wait any more."""
        self._leaving = True
        for order_id in self._places:
            self.wake(order_id)

    async def run(self) -> None:
        """Poll until `stop`."""
        await self._loop.run()

    def stop(self) -> None:
        """End the polling."""
        self._loop.stop()

    async def run_once(self) -> int:
        """Look once for all who wait. Always 0: the next look is due after the pause, whatever this one found."""
        waited_for = [order_id for order_id, places in self._places.items() if not all(e.is_set() for e in places)]
        if waited_for:
            async with db.connection(self._pool) as conn:
                ended = await queries.ended(conn, waited_for)
            for order_id in ended:
                self.wake(order_id)
        return 0

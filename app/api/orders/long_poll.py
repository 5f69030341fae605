"""Long polls: requests that wait until an order has ended.

A waiter holds no database connection. It registers *before* it reads the order, so an order that ends after the read
wakes it. Orders that end in this process wake their waiters at once. A poll finds orders that ended in other processes,
and wake-ups lost in a crash: one query for all waiters of the process, and none without waiters.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from uuid import UUID

from app import db
from app.loops import Loop
from app.observability.facts import LoopSucceeded
from app.observability.signals import Signals
from app.orders import queries

CAPACITY = 200  # well below the concurrency limit, so that waiting requests leave slots for others
POLL_SECONDS = 0.25  # the delay for orders that end in another process; too short for a person to notice


class Waiters:
    """The waiters of this process, by order. At capacity a request is answered at once."""

    def __init__(
        self, pool: db.Pool, signals: Signals, *, capacity: int = CAPACITY, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._pool = pool
        self._capacity = capacity
        self._loop = Loop("waiters", self.run_once, poll_seconds, lambda: signals.emit(LoopSucceeded("waiters")))
        self._events: dict[UUID, set[asyncio.Event]] = {}
        self._count = 0
        self._is_stopping = False

    @contextlib.contextmanager
    def register(self, order_id: UUID) -> Iterator[asyncio.Event | None]:
        """Yield an event that is set when the order has ended; None at capacity, or while the process stops."""
        if self._is_stopping or self._count >= self._capacity:
            yield None
            return
        ended = asyncio.Event()
        self._count += 1
        self._events.setdefault(order_id, set()).add(ended)
        try:
            yield ended
        finally:
            self._count -= 1
            events = self._events[order_id]
            events.discard(ended)
            if not events:
                del self._events[order_id]

    def wake(self, order_id: UUID) -> None:
        """Wake the waiters of an order whose end is committed."""
        for ended in self._events.get(order_id, ()):
            ended.set()

    def answer_all(self) -> None:
        """Answer all waiters now, and accept no more: the process is stopping."""
        self._is_stopping = True
        for order_id in self._events:
            self.wake(order_id)

    async def run(self) -> None:
        """Poll until `stop` is called."""
        await self._loop.run()

    def stop(self) -> None:
        """Stop polling."""
        self._loop.stop()

    async def run_once(self) -> int:
        """Poll once for all waiters. Returns 0, so that the loop always pauses before the next poll."""
        order_ids = [
            order_id for order_id, events in self._events.items() if not all(event.is_set() for event in events)
        ]
        if order_ids:
            async with db.connection(self._pool) as conn:
                ended = await queries.ended(conn, order_ids)
            for order_id in ended:
                self.wake(order_id)
        return 0

"""Sample the run once a second: the backlog from Postgres, the answers from the clients' histories."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import asyncpg

from load import Histories

SAMPLE_SECONDS = 1.0
BACKLOG = """
    SELECT (SELECT count(*) FROM outbox WHERE published_at IS NULL) AS events,
           (SELECT count(*) FROM orders WHERE status IN ('pending', 'compensating')) AS orders
"""


@dataclass
class Series:
    """What was seen, by second of the run. `None`: not measured, because Postgres was down."""

    events: list[int | None] = field(default_factory=list)  # that wait in the outbox
    orders: list[int | None] = field(default_factory=list)  # that have not ended
    acknowledged: list[int] = field(default_factory=list)  # keys that got their first 201 in this second
    p50_seconds: list[float | None] = field(default_factory=list)
    p99_seconds: list[float | None] = field(default_factory=list)


class Sampler:
    """Samples until cancelled."""

    def __init__(self, database_url: str) -> None:
        self.started_at = time.monotonic()
        self._url = database_url
        self._backlog: list[tuple[int | None, int | None]] = []

    async def run(self) -> None:
        """Sample the backlog every second."""
        conn: asyncpg.Connection | None = None
        while True:
            try:
                async with asyncio.timeout(SAMPLE_SECONDS):
                    conn = conn or await asyncpg.connect(self._url)
                    [row] = await conn.fetch(BACKLOG)
                    self._backlog.append((row["events"], row["orders"]))
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):  # Postgres is down or frozen
                self._backlog.append((None, None))
                if conn is not None:
                    conn.terminate()
                conn = None
            next_at = self.started_at + len(self._backlog) * SAMPLE_SECONDS
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    def series(self, histories: Histories) -> Series:
        """Return all samples, with the answers of each second."""
        by_second: list[list[float]] = [[] for _ in self._backlog]
        acknowledged = [0 for _ in self._backlog]
        for history in histories.by_number.values():
            if history.acknowledged_at is not None:
                second = int(history.acknowledged_at - self.started_at)
                if 0 <= second < len(by_second):
                    acknowledged[second] += 1
                    if history.acknowledged_seconds is not None:
                        by_second[second].append(history.acknowledged_seconds)
        for values in by_second:
            values.sort()
        return Series(
            events=[events for events, _ in self._backlog],
            orders=[orders for _, orders in self._backlog],
            acknowledged=acknowledged,
            p50_seconds=[values[len(values) // 2] if values else None for values in by_second],
            p99_seconds=[values[int(len(values) * 0.99)] if values else None for values in by_second],
        )


@contextlib.asynccontextmanager
async def sampling(sampler: Sampler) -> AsyncIterator[None]:
    """Sample during the block."""
    task = asyncio.create_task(sampler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])

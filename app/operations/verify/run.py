"""One pass over all invariants. It only reads, and may run at any time beside the service."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from app import db
from app.operations.verify import balances, broker_side, effects, events, keys, limits, overdue, records, snapshot
from app.operations.verify.books import Book
from app.operations.verify.broker_side import BrokerSide, Depths
from app.operations.verify.findings import MAX_SUSPECTS, Findings, Invariant, Suspicion
from app.operations.verify.partners_side import PartnersSide
from app.operations.verify.report import VerifyReport, make_verdict
from app.operations.verify.snapshot import Bounds, OrderFacts
from app.orders.model import rfc3339

MARGIN = timedelta(seconds=60)  # between clocks: rows this close to the end of their retention may be gone

Progress = Callable[[int, int], None]  # how many orders were examined, and how many there are


@dataclass(frozen=True, slots=True)
class VerifyConfig:
    """What a pass needs to know of the service.

    `consumer`: the inbox name of the saga's consumer. `grace_seconds`: a lease and a call, after which nothing that was
    in progress still is. `page_size`: how many orders are in memory at a time.
    """

    consumer: str
    outbox_retention_seconds: float
    inbox_retention_seconds: float
    saga_retention_seconds: float
    grace_seconds: float
    max_pending: int
    page_size: int = 500


@dataclass(frozen=True, slots=True)
class Scope:
    """The orders to examine: those placed in the last `since_seconds` (None: all), the newest `limit` of them.

    `whole_tables`: also look through keys, outbox and stock, which no selection of orders narrows.
    """

    since_seconds: float | None = None
    limit: int | None = None
    whole_tables: bool = True


class Verifier:
    """Runs passes. `missing`: why a partner cannot be asked at all, by its name."""

    def __init__(
        self,
        pool: db.Pool,
        broker: BrokerSide,
        books: Sequence[Book],
        missing: Mapping[str, str],
        config: VerifyConfig,
    ) -> None:
        self._pool = pool
        self._broker = broker
        self._books = books
        self._missing = missing
        self._config = config

    async def run(self, scope: Scope = Scope(), progress: Progress = lambda *_: None) -> VerifyReport:
        """Run one pass. Raises DatabaseUnavailable."""
        started = time.monotonic()
        async with db.connection(self._pool) as conn:
            bounds = await snapshot.find_bounds(conn, scope.since_seconds, scope.limit)
        found, first = Findings(), Findings()
        partners = PartnersSide(self._pool, self._books, self._missing, found)
        await self._examine_orders(bounds, partners, first, found, progress)
        if scope.whole_tables:
            await self._examine_tables(bounds, partners, found)
        depths = await self._broker.examine(self._pool, found)
        found.suspect(await overdue.find(self._pool, broker_works=depths.is_known))
        await self._look_again(first, partners, depths, found)
        return VerifyReport(
            checked_at=rfc3339(bounds.at),
            took_seconds=round(time.monotonic() - started, 3),
            orders=bounds.orders,
            invariants=[make_verdict(invariant, found, bounds.orders) for invariant in Invariant],
        )

    async def _examine_orders(
        self, bounds: Bounds, partners: PartnersSide, first: Findings, found: Findings, progress: Progress
    ) -> None:
        done = 0
        progress(0, bounds.orders)
        async for after, page in self._pages(bounds):
            first.suspect(self._judge_tables(page, bounds.at))
            first.suspect(await partners.judge_page(page, after, page[-1].id))
            self._count(page, bounds.at, found)
            done += len(page)
            progress(done, max(done, bounds.orders))

    async def _pages(self, bounds: Bounds) -> AsyncIterator[tuple[UUID, list[OrderFacts]]]:
        after = bounds.start
        while after < bounds.end:
            async with db.connection(self._pool) as conn:
                page = await snapshot.read_page(conn, self._config.consumer, after, bounds.end, self._config.page_size)
            if not page:
                return
            yield after, page
            after = page[-1].id

    def _judge_tables(self, page: Sequence[OrderFacts], now: datetime) -> Iterator[Suspicion]:
        events_since = self._kept_since(now, self._config.outbox_retention_seconds)
        sagas_since = self._kept_since(now, self._config.saga_retention_seconds)
        inbox_since = self._kept_since(now, self._config.inbox_retention_seconds)
        for order in page:
            yield from records.judge(order, events_since)
            yield from events.judge(order)
            if events.is_lost(order, now):
                yield Suspicion(Invariant.I3, str(order.id), events.LOST, order.changed_at)
            yield from effects.judge(order, sagas_since, inbox_since)
            yield from balances.judge_cancel(order)
            yield from limits.judge(order, now)

    def _count(self, page: Sequence[OrderFacts], now: datetime, found: Findings) -> None:
        events_since = self._kept_since(now, self._config.outbox_retention_seconds)
        found.count(len(page), *(set(Invariant) - {Invariant.I3, Invariant.I5, Invariant.I7}))
        found.count(sum(records.expects_events(order, events_since) for order in page), Invariant.I3)

    async def _examine_tables(self, bounds: Bounds, partners: PartnersSide, found: Findings) -> None:
        await partners.judge_rest(bounds.end)
        number = 0
        async for page_size, suspicions in keys.walk(self._pool, self._config.page_size):
            number += page_size
            found.suspect(suspicions)
        found.suspect(await keys.find_shared(self._pool, MAX_SUSPECTS))
        found.note(f"{number} keys", Invariant.I2)
        found.suspect(await broker_side.find_foreign_events(self._pool, MAX_SUSPECTS))
        found.suspect(await broker_side.measure_backlog(self._pool, self._config.max_pending))

    async def _look_again(self, first: Findings, partners: PartnersSide, depths: Depths, found: Findings) -> None:
        """Judge suspects by fresh rows, once nothing is in progress any more that started before they were read."""
        if not first.suspects:
            return
        await self._settle(first.suspects.values())
        ids = sorted({UUID(suspicion.subject) for suspicion in first.suspects.values()})
        for start in range(0, len(ids), self._config.page_size):
            batch = ids[start : start + self._config.page_size]
            async with db.connection(self._pool) as conn:
                orders = await snapshot.read_again(conn, self._config.consumer, batch)
                now = await db.now(conn)
            again = [*self._judge_tables(orders, now), *await partners.judge_again(orders)]
            found.suspect(broker_side.keep_proven(again, depths, found))
        for invariant, number in first.overflow.items():
            if any(True for _ in found.of(invariant)):
                found.overflow[invariant] += number

    async def _settle(self, suspicions: Iterable[Suspicion]) -> None:
        """Wait until the grace after the last change of a suspect is over."""
        async with db.connection(self._pool) as conn:
            now = await db.now(conn)
        changes = [suspicion.since for suspicion in suspicions if suspicion.since is not None]
        if changes:
            rest = (max(changes) - now).total_seconds() + self._config.grace_seconds
            await asyncio.sleep(min(max(rest, 0.0), self._config.grace_seconds))

    def _kept_since(self, now: datetime, retention_seconds: float) -> datetime:
        return now - timedelta(seconds=retention_seconds) + MARGIN

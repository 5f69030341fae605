"""One pass over all invariants. It only reads, and may run at any time beside the service."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from app.values import immutable

MARGIN = timedelta(seconds=60)  # between clocks: rows this close to the end of their retention may be gone
OVERDUE_POLL_SECONDS = 1.0

Progress = Callable[[int, int], None]  # how many orders were examined, and how many there are


@immutable
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


@immutable
class Scope:
    """What a pass examines: the first `limit` orders after `start`, placed in the last `since_seconds`.

    `until_seconds`: leave out orders placed in the last so many seconds. `again`: orders to judge besides. `is_whole`:
    also look through all keys, outbox, stock and the rest of the ledger, which no selection of orders narrows; else
    only through the next keys, those that expire after `keys_after`.
    `is_patient`: wait for the grace of suspects; else leave those out whose grace is not over.
    """

    since_seconds: float | None = None
    start: UUID | None = None
    until_seconds: float = 0
    limit: int | None = None
    again: Collection[UUID] = ()
    keys_after: datetime | None = None
    is_whole: bool = True
    is_patient: bool = True


@dataclass(slots=True)
class Pass:
    """One pass. `first`: what looked wrong at first sight. `unfinished`: orders that no partner could be judged for."""

    scope: Scope
    bounds: Bounds
    found: Findings = field(default_factory=Findings)
    first: Findings = field(default_factory=Findings)
    unfinished: set[UUID] = field(default_factory=set)
    keys_until: datetime | None = None
    seconds: float = 0.0

    def report(self) -> VerifyReport:
        """Return the verdicts."""
        return VerifyReport(
            checked_at=rfc3339(self.bounds.at),
            took_seconds=round(self.seconds, 3),
            orders=self.bounds.orders,
            invariants=[make_verdict(invariant, self.found, self.bounds.orders) for invariant in Invariant],
        )


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

    async def run(self, scope: Scope, progress: Progress = lambda *_: None) -> Pass:
        """Run one pass. Raises DatabaseUnavailable."""
        started = time.monotonic()
        async with db.connection(self._pool) as conn:
            bounds = await snapshot.find_bounds(
                conn, scope.start, scope.since_seconds, scope.until_seconds, scope.limit
            )
        run = Pass(scope, bounds)
        partners = PartnersSide(self._pool, self._books, self._missing, run.found)
        await self._examine_orders(run, partners, progress)
        if scope.is_whole:
            await self._examine_tables(run, partners)
        else:
            number, suspicions, run.keys_until = await keys.read_next(self._pool, scope.keys_after, MAX_SUSPECTS)
            run.found.suspect(suspicions)
            run.found.note(_count_keys(number), Invariant.I2)
        depths = await self._broker.examine(self._pool, run.found)
        await self._examine_ages(run, broker_works=depths.is_known)
        await self._look_again(run, partners, depths)
        run.seconds = time.monotonic() - started
        return run

    async def _examine_orders(self, run: Pass, partners: PartnersSide, progress: Progress) -> None:
        done, bounds = 0, run.bounds
        progress(0, bounds.orders)
        async for after, page in self._pages(bounds):
            run.first.suspect(self._judge_tables(page, bounds.at))
            run.first.suspect(await partners.judge_page(page, after, page[-1].id))
            self._count(page, run)
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
        events_since = _kept_since(now, self._config.outbox_retention_seconds)
        sagas_since = _kept_since(now, self._config.saga_retention_seconds)
        inbox_since = _kept_since(now, self._config.inbox_retention_seconds)
        for order in page:
            yield from records.judge(order, events_since)
            yield from events.judge(order)
            if events.is_lost(order, now):
                yield Suspicion(Invariant.I3, str(order.id), events.LOST, order.changed_at)
            yield from effects.judge(order, sagas_since, inbox_since)
            yield from balances.judge_cancel(order)
            yield from limits.judge(order, now)

    def _count(self, page: Sequence[OrderFacts], run: Pass) -> None:
        events_since = _kept_since(run.bounds.at, self._config.outbox_retention_seconds)
        run.found.count(len(page), *(set(Invariant) - {Invariant.I3, Invariant.I5, Invariant.I7}))
        run.found.count(sum(records.expects_events(order, events_since) for order in page), Invariant.I3)
        room = MAX_SUSPECTS - len(run.unfinished)
        run.unfinished.update([order.id for order in page if not order.is_final][:room])

    async def _examine_tables(self, run: Pass, partners: PartnersSide) -> None:
        await partners.judge_rest(run.bounds.end)
        number = 0
        async for page_size, suspicions in keys.walk(self._pool, self._config.page_size):
            number += page_size
            run.found.suspect(suspicions)
        run.found.suspect(await keys.find_shared(self._pool, MAX_SUSPECTS))
        run.found.note(_count_keys(number), Invariant.I2)
        run.found.suspect(await broker_side.find_foreign_events(self._pool, MAX_SUSPECTS))
        run.found.suspect(await broker_side.measure_backlog(self._pool, self._config.max_pending))

    async def _examine_ages(self, run: Pass, *, broker_works: bool) -> None:
        """Find overdue rows. Those that the next call of a saga may cure are overdue only if none cures them."""
        run.found.suspect(await overdue.find(self._pool, overdue.INCURABLE, broker_works=broker_works))
        curable = await overdue.find(self._pool, overdue.CURABLE, broker_works=broker_works)
        if not run.scope.is_patient:
            curable = [suspicion for suspicion in curable if _as_id(suspicion.subject) in run.scope.again]
            run.found.suspect(curable)
            return
        ends_at = time.monotonic() + self._config.grace_seconds
        while curable and time.monotonic() < ends_at:
            await asyncio.sleep(min(OVERDUE_POLL_SECONDS, max(0.0, ends_at - time.monotonic())))
            still = {
                item.subject for item in await overdue.find(self._pool, overdue.CURABLE, broker_works=broker_works)
            }
            curable = [suspicion for suspicion in curable if suspicion.subject in still]
        run.found.suspect(curable)

    async def _look_again(self, run: Pass, partners: PartnersSide, depths: Depths) -> None:
        """Judge suspects by fresh rows, once nothing is in progress any more that started before they were read."""
        suspects = await self._settle(run)
        ids = sorted({UUID(suspicion.subject) for suspicion in suspects} | set(run.scope.again))
        for start in range(0, len(ids), self._config.page_size):
            batch = ids[start : start + self._config.page_size]
            async with db.connection(self._pool) as conn:
                orders = await snapshot.read_again(conn, self._config.consumer, batch)
                now = await db.now(conn)
            again = [*self._judge_tables(orders, now), *await partners.judge_again(orders, batch)]
            run.found.suspect(broker_side.keep_proven(again, depths, run.found))
            run.unfinished.update(order.id for order in orders if not order.is_final)
        _count_overflow(run)

    async def _settle(self, run: Pass) -> list[Suspicion]:
        """Return the suspects whose grace is over; a patient pass waits for all of them."""
        suspects = list(run.first.suspects.values())
        async with db.connection(self._pool) as conn:
            now = await db.now(conn)
        if not run.scope.is_patient:
            return [suspicion for suspicion in suspects if self._grace_left(suspicion, now) <= 0]
        rest = max((self._grace_left(suspicion, now) for suspicion in suspects), default=0.0)
        await asyncio.sleep(min(max(rest, 0.0), self._config.grace_seconds))
        return suspects

    def _grace_left(self, suspicion: Suspicion, now: datetime) -> float:
        changed_at = suspicion.since or now
        return (changed_at - now).total_seconds() + self._config.grace_seconds


def _count_overflow(run: Pass) -> None:
    """Count suspects that were too many to be looked at again; they are not proven if none of the others was."""
    for invariant, number in run.first.overflow.items():
        if run.found.kept[invariant]:
            suspects = run.first.kept[invariant] + number
            run.found.overflow[invariant] = max(run.found.overflow[invariant], suspects - run.found.kept[invariant])
        else:
            run.found.hinder(f"{number:,} suspects were too many to be looked at again", invariant)


def _count_keys(number: int) -> str:
    return "1 key" if number == 1 else f"{number:,} keys"


def violating_orders(suspicions: Iterable[Suspicion]) -> set[UUID]:
    """Return the subjects that are ids."""
    return {found for suspicion in suspicions if (found := _as_id(suspicion.subject)) is not None}


def _as_id(subject: str) -> UUID | None:
    try:
        return UUID(subject)
    except ValueError:
        return None


def _kept_since(now: datetime, retention_seconds: float) -> datetime:
    return now - timedelta(seconds=retention_seconds) + MARGIN

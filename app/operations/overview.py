"""How the service is doing, at a glance: what is wrong, what happened in the last minutes, and the partners."""

from collections.abc import Callable, Sequence

from pydantic import BaseModel

from app import db
from app.observability.signals import Signals
from app.operations import concerns, partner_views
from app.operations.concerns import Concern, Known
from app.operations.partner_views import PartnerView
from app.operations.recent import (
    SLOT_SECONDS,
    Buckets,
    RecentHistory,
    Slot,
    bucket_percentile,
    percentile,
    total,
)
from app.orders.model import rfc3339
from app.partners.circuit import CircuitState

MINUTE_SLOTS = 60 // SLOT_SECONDS


class Rate(BaseModel):
    """How many orders. `per_second`: in the last slot. `total`: in all slots. Null: unknown."""

    per_second: float | None
    total: int
    by_slot: list[float | None]


class Latency(BaseModel):
    """How long something took in the last minute, in seconds. Null: it did not happen, or is unknown.

    `by_slot`: the 99th percentile.
    """

    p50_seconds: float | None
    p99_seconds: float | None
    by_slot: list[float | None]


class Backlog(BaseModel):
    """What is unfinished now, and since when the oldest waits; null: nothing waits.

    `by_slot`: unfinished orders; null: not measured.
    """

    unfinished_orders: int
    pending_events: int
    oldest_saga_at: str | None
    oldest_event_at: str | None
    by_slot: list[int | None]


class OverviewAnswer(BaseModel):
    """How the service is doing. `concerns`: the most pressing first. A slot is `slot_seconds` long; oldest first.

    `answers`: of this process, from an order's request to its 201. `sagas`: from start to end. `verified_at`: when this
    process last verified invariants of recent orders; null: it has not.
    """

    concerns: list[Concern]
    slot_seconds: int
    placed: Rate
    finished: Rate
    answers: Latency
    sagas: Latency
    backlog: Backlog
    partners: list[PartnerView]
    verified_at: str | None


class Overview:
    """Reads the overview. `consumer`: the inbox name of the saga's. `has_broker`: as in `concerns.find`.

    `circuit_state`: of a partner; None: this process calls none. `read_answers`: as in `RecentHistory`.
    """

    def __init__(
        self,
        pool: db.Pool,
        signals: Signals,
        consumer: str,
        circuit_state: Callable[[str], CircuitState] | None,
        read_answers: Callable[[], Buckets],
        *,
        has_broker: bool,
    ) -> None:
        self._pool = pool
        self._consumer = consumer
        self._circuit_state = circuit_state
        self._has_broker = has_broker
        self._history = RecentHistory(read_answers)
        self._known = Known()
        self._known.subscribe(signals)

    async def read(self) -> OverviewAnswer:
        """Return the overview. Raises DatabaseUnavailable."""
        async with db.connection(self._pool) as conn:
            situation = await concerns.read(conn, self._consumer)
            await self._history.update(conn, situation.now, situation.unfinished)
        partners = (await partner_views.read_partners(self._pool, self._circuit_state)).partners
        slots, verified_at = self._history.slots(), self._known.verified_at
        oldest_saga_at, oldest_event_at = situation.oldest_saga_at, situation.oldest_event_at
        return OverviewAnswer(
            concerns=concerns.find(situation, self._known, partners, has_broker=self._has_broker),
            slot_seconds=SLOT_SECONDS,
            placed=_rate([None if slot is None else slot.placed for slot in slots]),
            finished=_rate([None if slot is None else slot.finished for slot in slots]),
            answers=_answer_latency(slots),
            sagas=_saga_latency(slots),
            backlog=Backlog(
                unfinished_orders=situation.unfinished,
                pending_events=situation.pending,
                oldest_saga_at=None if oldest_saga_at is None else rfc3339(oldest_saga_at),
                oldest_event_at=None if oldest_event_at is None else rfc3339(oldest_event_at),
                by_slot=[None if slot is None else slot.backlog for slot in slots],
            ),
            partners=partners,
            verified_at=None if verified_at is None else rfc3339(verified_at),
        )


def _rate(numbers: Sequence[int | None]) -> Rate:
    by_slot = [None if number is None else number / SLOT_SECONDS for number in numbers]
    return Rate(per_second=by_slot[-1], total=sum(filter(None, numbers)), by_slot=by_slot)


def _answer_latency(slots: Sequence[Slot | None]) -> Latency:
    minute = total(slots[-MINUTE_SLOTS:])
    return Latency(
        p50_seconds=bucket_percentile(minute, 0.5),
        p99_seconds=bucket_percentile(minute, 0.99),
        by_slot=[None if slot is None else bucket_percentile(slot.answers or (), 0.99) for slot in slots],
    )


def _saga_latency(slots: Sequence[Slot | None]) -> Latency:
    minute = [seconds for slot in slots[-MINUTE_SLOTS:] if slot for seconds in slot.saga_seconds]
    return Latency(
        p50_seconds=percentile(minute, 0.5),
        p99_seconds=percentile(minute, 0.99),
        by_slot=[None if slot is None else percentile(slot.saga_seconds, 0.99) for slot in slots],
    )

"""What is wrong with the service now, in words, the most pressing first.

Postgres knows most of it, of all processes. The dead letters of a broker, open circuits and violated invariants are
those that this process knows of.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.messaging.facts import QueueMeasured
from app.messaging.outbox import PENDING
from app.observability.signals import Signals
from app.operations import ages
from app.operations.ages import LIMITS
from app.operations.maintenance.facts import InvariantExamined, UnstartedMeasured
from app.operations.partner_views import PartnerView
from app.operations.verify.findings import Invariant
from app.orders.model import rfc3339
from app.orders.queries import IS_UNFINISHED
from app.saga.queries import STUCK
from app.saga.unstarted import DEAD
from app.values import immutable

OLD_SAGA_SECONDS = 300.0  # as the alert SagaUnfinished
OLD_EVENT_SECONDS = next(
    limit.limit_seconds or 0.0 for limit in LIMITS if (limit.table, limit.state) == ("outbox", "waiting")
)
COUNTED_LIMITS = tuple(limit for limit in ages.gauged() if limit.table != "sagas")  # those of sagas count as stuck

# What is unfinished, in one pass over each table. Parameter: the inbox name of the saga's consumer.
SITUATION = f"""
SELECT clock_timestamp() AS now, saga.*, event.*, oldest.*, (
    SELECT count(*) FROM orders WHERE {IS_UNFINISHED}
) AS unfinished, (
    SELECT count(*) FROM (SELECT FROM {DEAD} LIMIT {ages.COUNTED_ROWS:d}) AS blocked
) AS blocked, (
    SELECT count(*) FROM (
        SELECT FROM inbox WHERE dead_at IS NOT NULL AND processed_at IS NULL AND purged_at IS NULL
        LIMIT {ages.COUNTED_ROWS:d}
    ) AS dead
) AS dead_letters
FROM (
    SELECT count(*) FILTER (WHERE {STUCK}) AS stuck,
           count(*) FILTER (WHERE s.needs_operator_at <= clock_timestamp()) AS needs_operator
    FROM sagas s WHERE s.finished_at IS NULL
) AS saga, (
    SELECT count(*) FILTER (WHERE {PENDING}) AS pending, count(*) FILTER (WHERE parked_at IS NOT NULL) AS parked,
           min(coalesce(pending_since, occurred_at)) FILTER (WHERE {PENDING}) AS oldest_event_at
    FROM outbox WHERE published_at IS NULL
) AS event
LEFT JOIN (
    SELECT id AS oldest_saga_id, started_at AS oldest_saga_at FROM sagas WHERE finished_at IS NULL
    ORDER BY started_at LIMIT 1
) AS oldest ON true
"""  # noqa: S608 - constants


class ConcernKind(StrEnum):
    """What may be wrong, the most pressing first."""

    VIOLATED = "violated"
    NEEDS_OPERATOR = "needs-operator"
    STUCK = "stuck"
    CANNOT_START = "cannot-start"
    DEAD_LETTERS = "dead-letters"
    PARKED = "parked"
    CIRCUIT_OPEN = "circuit-open"
    OLD_EVENT = "old-event"
    OLD_SAGA = "old-saga"
    NO_SAGA = "no-saga"
    OVERDUE = "overdue"
    PAUSED = "paused"


class Concern(BaseModel):
    """Something that is wrong. `subject`: the partner, invariant, table or order that it is about; null: no single one.

    `count`: of orders, events, dead letters or rows. `message`: what is wrong; `detail`: what it means, or what to do.
    `since`: null: unknown.
    """

    kind: ConcernKind
    level: Literal["bad", "warn"]
    count: int
    message: str
    detail: str
    subject: str | None = None
    since: str | None = None


@immutable
class Situation:
    """What Postgres knows at `now`. `blocked`: orders whose event is a dead letter or purged.

    `unfinished`: orders; `pending`, `parked`: events. `oldest_saga_id`, `oldest_saga_at`: of unfinished sagas.
    """

    now: datetime
    stuck: int
    needs_operator: int
    oldest_saga_id: UUID | None
    oldest_saga_at: datetime | None
    pending: int
    parked: int
    oldest_event_at: datetime | None
    unfinished: int
    blocked: int
    dead_letters: int
    overdue: Mapping[tuple[str, str], int]


@dataclass(slots=True)
class Known:
    """What this process was told last.

    `dead_letters`: by queue of a broker; empty: this process measures none. `violations`: by invariant. `verified_at`:
    when it last verified any; None: never. `unstarted`: orders without a saga; None: unknown.
    """

    dead_letters: dict[str, int] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=dict)
    verified_at: datetime | None = None
    unstarted: int | None = None

    def subscribe(self, signals: Signals) -> None:
        """Keep up with what this process measures."""
        signals.subscribe(QueueMeasured, self._keep_depth)
        signals.subscribe(InvariantExamined, self._keep_verdict)
        signals.subscribe(UnstartedMeasured, self._keep_unstarted)

    def _keep_depth(self, fact: QueueMeasured) -> None:
        self.dead_letters[fact.queue] = fact.dead_letters

    def _keep_verdict(self, fact: InvariantExamined) -> None:
        self.violations[fact.invariant] = fact.violations
        self.verified_at = datetime.now(UTC)

    def _keep_unstarted(self, fact: UnstartedMeasured) -> None:
        self.unstarted = fact.orders


async def read(conn: db.Connection, consumer: str) -> Situation:
    """Read the situation. `consumer`: the inbox name of the saga's consumer."""
    row: Any = await conn.fetchrow(SITUATION, consumer)
    return Situation(**row, overdue=await ages.count_overdue(conn, COUNTED_LIMITS))


def find(situation: Situation, known: Known, partners: Collection[PartnerView], *, has_broker: bool) -> list[Concern]:
    """Return what is wrong, the most pressing first. `has_broker`: its dead letters are not the parked events."""
    found = [
        *_find_violations(known),
        *_find_orders(situation, known),
        *_find_messages(situation, known, has_broker=has_broker),
        *_find_overdue(situation),
        *_find_partners(partners),
    ]
    order = list(ConcernKind)
    return sorted(found, key=lambda concern: order.index(concern.kind))


def _find_violations(known: Known) -> Iterator[Concern]:
    """I6 is about what waits too long. Other concerns report that sooner, and say where it is."""
    for invariant, violations in known.violations.items():
        if violations:
            is_repeated = invariant == Invariant.I6
            yield Concern(
                kind=ConcernKind.OVERDUE if is_repeated else ConcernKind.VIOLATED,
                level="warn" if is_repeated else "bad",
                count=violations,
                message=f"invariant {invariant} is violated in {_number(violations, 'case', 'cases')}",
                detail="among recent orders, as last verified; the command orders verify names them",
                subject=invariant,
            )


def _find_orders(situation: Situation, known: Known) -> Iterator[Concern]:
    if number := situation.needs_operator:
        yield Concern(
            kind=ConcernKind.NEEDS_OPERATOR,
            level="bad",
            count=number,
            message=_number(number, "order needs an operator", "orders need an operator"),
            detail="an undo keeps failing, or a partner gave an answer that no retry will change",
        )
    if number := situation.stuck:
        yield Concern(
            kind=ConcernKind.STUCK,
            level="bad",
            count=number,
            message=_number(number, "order is stuck", "orders are stuck"),
            detail="more than a minute overdue or past the deadline, or waiting for an operator",
        )
    if number := situation.blocked:
        yield Concern(
            kind=ConcernKind.CANNOT_START,
            level="bad",
            count=number,
            message=_number(number, "order cannot start", "orders cannot start"),
            detail="the event that starts it is a dead letter, or was purged: replay it, or cancel the order",
        )
    if (number := (known.unstarted or 0) - situation.blocked) > 0:
        yield Concern(
            kind=ConcernKind.NO_SAGA,
            level="warn",
            count=number,
            message=_number(number, "order has no saga", "orders have no saga") + " after a minute",
            detail="its event is not published or not consumed yet",
        )
    if _is_older(situation.oldest_saga_at, situation.now, OLD_SAGA_SECONDS):
        yield Concern(
            kind=ConcernKind.OLD_SAGA,
            level="warn",
            count=1,
            message="the oldest unfinished saga is more than 5 minutes old",
            detail="the page of its order says what it waits for",
            subject=str(situation.oldest_saga_id),
            since=_instant(situation.oldest_saga_at),
        )


def _find_messages(situation: Situation, known: Known, *, has_broker: bool) -> Iterator[Concern]:
    parked = situation.parked
    dead = sum(known.dead_letters.values()) if known.dead_letters else situation.dead_letters
    if not has_broker:
        dead, parked = parked, 0
    if dead:
        yield Concern(
            kind=ConcernKind.DEAD_LETTERS,
            level="bad",
            count=dead,
            message=_number(dead, "dead letter", "dead letters"),
            detail="the consumer could not handle it: see why, fix that, then replay",
        )
    if parked:
        yield Concern(
            kind=ConcernKind.PARKED,
            level="bad",
            count=parked,
            message=_number(parked, "event is parked", "events are parked"),
            detail="the broker refused it too often: see why, fix that, then requeue",
        )
    if _is_older(situation.oldest_event_at, situation.now, OLD_EVENT_SECONDS):
        yield Concern(
            kind=ConcernKind.OLD_EVENT,
            level="bad",
            count=situation.pending,
            message=f"events wait for the broker: {_number(situation.pending, 'event', 'events')}",
            detail="the oldest has waited for more than a minute",
            since=_instant(situation.oldest_event_at),
        )


def _find_overdue(situation: Situation) -> Iterator[Concern]:
    notes = {(limit.table, limit.state): limit.note for limit in COUNTED_LIMITS}
    for (table, state), rows in situation.overdue.items():
        if rows:
            yield Concern(
                kind=ConcernKind.OVERDUE,
                level="warn",
                count=rows,
                message=f"{_number(rows, 'row', 'rows')} of {table} {'is' if rows == 1 else 'are'} past the age limit",
                detail=f"{state}: {notes[table, state]}",
                subject=table,
            )


def _find_partners(partners: Collection[PartnerView]) -> Iterator[Concern]:
    for view in partners:
        if view.circuit in {"open", "half-open"}:
            yield Concern(
                kind=ConcernKind.CIRCUIT_OPEN,
                level="bad",
                count=view.sagas,
                message=f"{view.partner} keeps failing",
                detail="its circuit is open: this process rests, and tries again by itself",
                subject=view.partner,
            )
        if view.pause is not None:
            yield Concern(
                kind=ConcernKind.PAUSED,
                level="warn",
                count=view.sagas,
                message=f"calls to {view.partner} are paused by {view.pause.actor}",
                detail=view.pause.reason,
                subject=view.partner,
                since=view.pause.paused_at,
            )


def _is_older(instant: datetime | None, now: datetime, seconds: float) -> bool:
    return instant is not None and now - instant > timedelta(seconds=seconds)


def _instant(moment: datetime | None) -> str | None:
    return None if moment is None else rfc3339(moment)


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"

"""What this process was told, and the state of circuits, become concerns; the most pressing come first."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.messaging.facts import QueueMeasured
from app.observability.signals import Signals
from app.operations import concerns
from app.operations.concerns import Concern, ConcernKind, Known, Situation
from app.operations.maintenance.facts import InvariantExamined, UnstartedMeasured
from app.operations.partner_views import PartnerView, PauseView

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
PAUSE = PauseView(paused_at="2026-11-21T11:00:00Z", ends_at="2026-11-21T13:00:00Z", actor="ada", reason="they asked")


def situation(**changes: Any) -> Situation:
    calm: dict[str, Any] = dict.fromkeys(
        ("stuck", "needs_operator", "pending", "parked", "unfinished", "blocked", "dead_letters"), 0
    )
    unknown = dict.fromkeys(("oldest_saga_id", "oldest_saga_at", "oldest_event_at"))
    return Situation(**{"now": NOW, **unknown, "overdue": {}, **calm, **changes})


def find(known: Known, *partners: PartnerView, has_broker: bool = True, **changes: Any) -> list[Concern]:
    return concerns.find(situation(**changes), known, partners, has_broker=has_broker)


def partner(circuit: Any = "closed", pause: PauseView | None = None) -> PartnerView:
    return PartnerView(partner="payment", pause=pause, circuit=circuit, sagas=4)


def test_a_violation_comes_first() -> None:
    """With the invariant and how often; it is gone when the next verification does not find it."""
    signals, known = Signals(), Known()
    known.subscribe(signals)
    signals.emit(InvariantExamined("I3", 2, is_complete=True))
    signals.emit(InvariantExamined("I4", 0, is_complete=True))
    found = find(known, stuck=1)
    assert [(concern.kind, concern.count) for concern in found] == [(ConcernKind.VIOLATED, 2), (ConcernKind.STUCK, 1)]
    assert found[0].message == "invariant I3 is violated in 2 cases"
    assert known.verified_at is not None
    signals.emit(InvariantExamined("I3", 0, is_complete=True))
    assert find(known) == []


def test_what_waits_too_long_is_not_the_first_concern() -> None:
    """I6 repeats, later, what other concerns say."""
    known = Known(violations={"I6": 4})
    assert [concern.kind for concern in find(known, stuck=4)] == [ConcernKind.STUCK, ConcernKind.OVERDUE]


def test_a_measured_queue_tells_its_dead_letters() -> None:
    """It also has those of which Postgres does not know, and no longer those that were replayed."""
    signals, known = Signals(), Known()
    known.subscribe(signals)
    assert [concern.message for concern in find(known, dead_letters=3)] == ["3 dead letters"]
    signals.emit(QueueMeasured("orders.saga", 0, 1))
    assert [concern.message for concern in find(known, dead_letters=3)] == ["1 dead letter"]
    signals.emit(QueueMeasured("orders.saga", 0, 0))
    assert find(known, dead_letters=3) == []


def test_an_order_without_a_saga_is_reported_once() -> None:
    """Either its event is known to be dead, or it is only late."""
    signals, known = Signals(), Known()
    known.subscribe(signals)
    signals.emit(UnstartedMeasured(3))
    assert [concern.message for concern in find(known, blocked=1)] == [
        "1 order cannot start",
        "2 orders have no saga after a minute",
    ]
    assert [concern.message for concern in find(known, blocked=3)] == ["3 orders cannot start"]


@pytest.mark.parametrize(
    ("view", "messages"),
    [
        (partner(), []),
        (partner(None), []),
        (partner("open"), ["payment keeps failing"]),
        (partner("half-open"), ["payment keeps failing"]),
        (partner("open", PAUSE), ["payment keeps failing", "calls to payment are paused by ada"]),
    ],
)
def test_a_partner_that_is_not_called_is_reported(view: PartnerView, messages: list[str]) -> None:
    assert [concern.message for concern in find(Known(), view)] == messages


def test_what_waits_is_reported_after_its_limit() -> None:
    """A minute for an event, five for a saga."""
    event, saga = timedelta(seconds=60), timedelta(minutes=5)
    assert find(Known(), pending=1, oldest_event_at=NOW - event, oldest_saga_at=NOW - saga) == []
    moment = timedelta(milliseconds=1)
    late = find(Known(), pending=2, oldest_event_at=NOW - event - moment, oldest_saga_at=NOW - saga - moment)
    assert [concern.kind for concern in late] == [ConcernKind.OLD_EVENT, ConcernKind.OLD_SAGA]
    assert late[0].since == "2026-11-21T11:58:59.999000Z"

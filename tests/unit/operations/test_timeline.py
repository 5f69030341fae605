"""Positions in an order's story, and why an order is stuck, as pure functions."""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.operations.timeline import Position, TimelineEntry, unseen
from app.operations.why_stuck import GRACE_SECONDS, Situation, explain

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
LONG_AGO = NOW - timedelta(seconds=GRACE_SECONDS + 1)
JUST_NOW = NOW - timedelta(seconds=GRACE_SECONDS - 1)
SOON = NOW + timedelta(seconds=7)
PENDING = Situation(ID, "pending", LONG_AGO, NOW, transport="rabbitmq")
UNPUBLISHED = dataclasses.replace(PENDING, event_id=ID, event_type="orders.order.placed.v1", event_since=LONG_AGO)
PUBLISHED = dataclasses.replace(PENDING, published_at=LONG_AGO)
RUNNING = dataclasses.replace(
    PUBLISHED, plan_version=1, direction="forward", step="charge_payment", attempts=2, due_at=SOON, deadline_at=SOON,
    last_at=LONG_AGO, last_outcome="unknown", call_since=LONG_AGO, answer_attempt=2, answer="unknown",
    answer_detail="HTTP 503",
)  # fmt: skip
UNDOING = dataclasses.replace(RUNNING, status="compensating", direction="backward")
CALLING = dataclasses.replace(RUNNING, lease_owner="host:1", last_outcome="attempted", last_at=JUST_NOW)
FIRST_CALL = dataclasses.replace(CALLING, attempts=1, answer_attempt=None, answer=None, answer_detail=None)
WAITING = dataclasses.replace(RUNNING, attempts=0, last_outcome="done", call_since=None, answer=None)
PAUSED = dataclasses.replace(
    RUNNING, paused_at=JUST_NOW, pause_ends_at=NOW + timedelta(seconds=60), pause_reason="it charges twice",
    deadline_at=NOW + timedelta(seconds=90),
)  # fmt: skip
LOCAL = dataclasses.replace(UNPUBLISHED, transport="in-process")


def entry(id_: str) -> TimelineEntry:
    return TimelineEntry(id=id_, at=None, source="saga", event="do")


def test_a_reader_that_resumes_misses_nothing_that_came_late() -> None:
    """An entry that became visible late is past the position, even if later ones were seen."""
    position = Position()
    for seen in ("placed", "3", "act-6"):
        position = position.after(entry(seen))
    again = Position.parse(str(position))
    assert again == position
    story = [entry(id_) for id_ in ("placed", "act-5", "end", "2", "3", "4", "act-6")]
    assert [found.id for found in unseen(story, again)] == ["act-5", "4", "end"]


@pytest.mark.parametrize("text", ["", "x", "1.", "1..a", "-1", "1.UPPER", "9" * 19, "1.a b", "1.a\n"])
def test_other_positions_are_refused(text: str) -> None:
    """Only an id that a stream sent is a position."""
    with pytest.raises(ValueError, match="must be the id"):
        Position.parse(text)


def test_a_hostile_position_is_refused_at_once() -> None:
    """The pattern has one way to match. With several, this text would take longer than the universe is old."""
    with pytest.raises(ValueError, match="must be the id"):
        Position.parse("0" + ".aaaaaaaaa" * 1000 + "!")


@pytest.mark.parametrize(
    ("situation", "changes", "waiting_for", "text"),
    [
        (UNPUBLISHED, {}, "broker", "order.placed waits to be published"),
        (UNPUBLISHED, {}, "broker", "check that a process with the role relay runs"),
        (UNPUBLISHED, {"event_error": "nack"}, "broker", "last refusal: nack"),
        (UNPUBLISHED, {"transport": None}, "operator", "no process with the role relay"),
        (UNPUBLISHED, {"parked_at": NOW, "event_error": "returned"}, "operator", f"orders outbox requeue {ID}"),
        (LOCAL, {}, "database", "order.placed waits to be handled"),
        (LOCAL, {"event_error": "KeyError"}, "database", "Handling its event order.placed failed (KeyError)"),
        (LOCAL, {"parked_at": NOW, "event_error": "KeyError"}, "operator", f"orders outbox requeue {ID}"),
        (LOCAL, {"parked_at": NOW, "dead_at": NOW, "event_id": ID}, "operator", f"orders dlq replay --id {ID}"),
        (PENDING, {}, "operator", "Its event is missing"),
        (
            PENDING,
            {"processed_at": NOW},
            "operator",
            f"saga is missing. An operator must end it: orders saga compensate {ID}",
        ),
        (PUBLISHED, {}, "broker", "no consumer has taken it"),
        (PUBLISHED, {"transport": None}, "operator", "no process with the role consumer"),
        (PUBLISHED, {"last_failure_at": NOW, "inbox_attempts": 1, "inbox_error": "KeyError"}, "database", "(KeyError)"),
        (PUBLISHED, {"last_failure_at": NOW, "inbox_attempts": 1, "transport": None}, "operator", "role consumer"),
        (PUBLISHED, {"last_failure_at": NOW, "inbox_attempts": 0}, "broker", "no consumer has taken it"),
        (PUBLISHED, {"dead_at": NOW, "inbox_error": "KeyError"}, "operator", f"orders dlq replay --id {ID}"),
        (PUBLISHED, {"dead_at": NOW, "purged_at": NOW}, "operator", f"orders saga compensate {ID}"),
        (
            RUNNING,
            {},
            "payment",
            "Payment failed charge_payment (attempt 2): no clear answer (HTTP 503). It is retried",
        ),
        (RUNNING, {"answer": "not-sent", "answer_detail": None}, "payment", "it could not be reached"),
        (RUNNING, {"step": "reserve_inventory"}, "inventory", "Inventory failed"),
        (RUNNING, {"step": "create_shipment"}, "shipping", "Shipping failed"),
        (RUNNING, {"deadline_at": NOW}, "payment", "Its deadline has passed"),
        (RUNNING, {"due_at": LONG_AGO}, "operator", "no process has taken it"),
        (RUNNING, {"due_at": LONG_AGO, "lease_owner": "host:1"}, "operator", "The process host:1 stopped"),
        (RUNNING, {"lease_owner": "host:1"}, "payment", "(attempt 2): no clear answer (HTTP 503). It is retried"),
        (RUNNING, {"needs_operator_at": NOW}, "operator", "An operator must look at it"),
        (RUNNING, {"answer": None}, "payment", "stopped before it recorded payment's answer"),
        (RUNNING, {"plan_version": 99}, "operator", "plan 99"),
        (WAITING, {}, "payment", "its circuit is open"),
        (WAITING, {"direction": "backward"}, "payment", "Next: the undo of charge_payment"),
        (WAITING, {"direction": "backward", "needs_operator_at": NOW}, "operator", "its circuit is open"),
        (WAITING, {"lease_owner": "host:1"}, "database", "Its next attempt is not recorded yet"),
        (
            PAUSED,
            {},
            "payment",
            "paused calls to payment until 2026-01-01T00:01:00.000000Z: it charges twice. Next: cha",
        ),
        (PAUSED, {"deadline_at": SOON}, "payment", "Its deadline, 2026-01-01T00:00:07.000000Z, comes first"),
        (PAUSED, {"direction": "backward", "deadline_at": LONG_AGO}, "payment", "Next: the undo of charge_payment."),
        (PAUSED, {"needs_operator_at": NOW}, "payment", "An operator paused calls to payment"),
        (PAUSED, {"attempts": 0, "last_at": JUST_NOW}, "payment", "An operator paused calls to payment"),
        (PAUSED, {"due_at": LONG_AGO}, "operator", "no process has taken it"),
        (PAUSED, {"lease_owner": "host:1", "last_outcome": "attempted"}, "payment", "Attempt 2 is in progress"),
        (
            CALLING,
            {"answer_attempt": 1},
            "payment",
            "(attempt 1): no clear answer (HTTP 503). Attempt 2 is in progress",
        ),
        (CALLING, {"needs_operator_at": NOW}, "operator", "Attempt 2 is in progress"),
        (FIRST_CALL, {"last_at": LONG_AGO}, "payment", "Payment has not answered charge_payment yet"),
        (UNDOING, {}, "payment", "Payment failed the undo of charge_payment (attempt 2)"),
        (UNDOING, {"needs_operator_at": NOW}, "operator", "Payment failed the undo of charge_payment (attempt 2)"),
        (
            dataclasses.replace(UNPUBLISHED, status="confirmed", event_type="orders.order.confirmed.v1"),
            {},
            "broker",
            "order.confirmed waits to be published",
        ),
    ],
)
def test_every_wait_is_explained(situation: Situation, changes: dict[str, Any], waiting_for: str, text: str) -> None:
    """Each kind of wait names whom the order waits for, and what helps."""
    why = explain(dataclasses.replace(situation, **changes))
    assert why is not None
    assert why.waiting_for == waiting_for
    assert text in why.message


@pytest.mark.parametrize(
    ("situation", "changes"),
    [
        (PENDING, {"placed_at": JUST_NOW}),
        (PENDING, {"status": "confirmed"}),
        (UNPUBLISHED, {"event_since": JUST_NOW}),
        (LOCAL, {"event_since": JUST_NOW}),
        (PUBLISHED, {"published_at": JUST_NOW}),
        (FIRST_CALL, {}),
        (WAITING, {"due_at": NOW, "last_at": JUST_NOW}),
        (WAITING, {"due_at": NOW, "last_at": None, "placed_at": JUST_NOW}),
        (WAITING, {"lease_owner": "host:1", "last_at": JUST_NOW}),
        (RUNNING, {"status": "confirmed", "finished_at": NOW}),
    ],
)
def test_an_order_that_moves_on_is_not_stuck(situation: Situation, changes: dict[str, Any]) -> None:
    """What normally takes milliseconds is explained only after some seconds; what has ended, never."""
    assert explain(dataclasses.replace(situation, **changes)) is None


def test_the_next_attempt_is_named() -> None:
    """`next_attempt_at` is when the saga goes on by itself; an order that waits for an operator alone has none."""
    why = explain(RUNNING)
    assert why is not None
    assert (why.since, why.next_attempt_at) == ("2025-12-31T23:59:54.000000Z", "2026-01-01T00:00:07.000000Z")
    for deadline, expected in ((90, "00:01:00"), (30, "00:00:30")):  # the end of a pause, or the deadline before it
        why = explain(dataclasses.replace(PAUSED, deadline_at=NOW + timedelta(seconds=deadline)))
        assert why is not None
        assert (why.since, why.next_attempt_at) == ("2025-12-31T23:59:56.000000Z", f"2026-01-01T{expected}.000000Z")
    for situation in (
        dataclasses.replace(UNPUBLISHED, parked_at=NOW),
        dataclasses.replace(UNPUBLISHED, event_due_at=LONG_AGO),
        dataclasses.replace(CALLING, due_at=SOON),  # the end of a lease is no attempt
    ):
        unscheduled = explain(situation)
        assert unscheduled is not None
        assert unscheduled.next_attempt_at is None

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
PENDING = Situation(ID, "pending", LONG_AGO, NOW, has_workers=True)
UNPUBLISHED = dataclasses.replace(PENDING, event_id=ID, event_type="orders.order.placed.v1", event_since=LONG_AGO)
PUBLISHED = dataclasses.replace(PENDING, published_at=LONG_AGO)
RUNNING = dataclasses.replace(
    PUBLISHED, plan_version=1, direction="forward", step="charge_payment", attempts=2, due_at=SOON,
    saga_updated_at=LONG_AGO, deadline_at=SOON, last_at=LONG_AGO, last_outcome="unknown", last_detail="HTTP 503",
)  # fmt: skip
UNDOING = dataclasses.replace(RUNNING, status="compensating", direction="backward")


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
        (UNPUBLISHED, {"event_error": "nack"}, "broker", "last refusal: nack"),
        (UNPUBLISHED, {"has_workers": False}, "operator", "no process with the role relay"),
        (UNPUBLISHED, {"parked_at": NOW, "event_error": "returned"}, "operator", f"orders outbox requeue {ID}"),
        (PUBLISHED, {}, "broker", "no consumer has taken it"),
        (PUBLISHED, {"has_workers": None}, "operator", "no process with the role consumer"),
        (PUBLISHED, {"last_failure_at": NOW, "inbox_error": "KeyError"}, "database", "failed to handle its event"),
        (PUBLISHED, {"dead_at": NOW, "inbox_error": "KeyError"}, "operator", f"orders dlq replay --id {ID}"),
        (PUBLISHED, {"dead_at": NOW, "purged_at": NOW}, "operator", f"orders saga compensate {ID}"),
        (
            RUNNING,
            {},
            "payment",
            "Payment failed charge_payment (attempt 2): no clear answer (HTTP 503). It is retried",
        ),
        (RUNNING, {"last_outcome": "not-sent", "last_detail": None}, "payment", "it could not be reached"),
        (RUNNING, {"step": "reserve_inventory"}, "inventory", "Inventory failed"),
        (RUNNING, {"step": "create_shipment"}, "shipping", "Shipping failed"),
        (RUNNING, {"deadline_at": NOW}, "payment", "Its deadline has passed"),
        (RUNNING, {"attempts": 0}, "payment", "its circuit is open"),
        (RUNNING, {"due_at": LONG_AGO}, "operator", "no process has taken it"),
        (RUNNING, {"due_at": LONG_AGO, "lease_owner": "host:1"}, "operator", "The process host:1 stopped"),
        (RUNNING, {"lease_owner": "host:1", "last_outcome": "attempted"}, "payment", "Payment has not answered"),
        (RUNNING, {"lease_owner": "host:1"}, "database", "waits for the database"),
        (RUNNING, {"step": None}, "database", "Every step is done"),
        (RUNNING, {"needs_operator_at": NOW}, "operator", "An operator must look at it"),
        (UNDOING, {}, "payment", "Payment failed the undo of charge_payment (attempt 2)"),
        (UNDOING, {"needs_operator_at": NOW}, "operator", "Payment keeps failing the undo of charge_payment"),
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
        (PENDING, {}),
        (PENDING, {"status": "confirmed"}),
        (UNPUBLISHED, {"event_since": JUST_NOW}),
        (PUBLISHED, {"published_at": JUST_NOW}),
        (RUNNING, {"lease_owner": "host:1", "last_outcome": "attempted", "last_at": JUST_NOW}),
        (RUNNING, {"status": "confirmed", "finished_at": NOW}),
        (RUNNING, {"step": None, "last_at": JUST_NOW}),
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
    parked = explain(dataclasses.replace(UNPUBLISHED, parked_at=NOW))
    assert parked is not None
    assert parked.next_attempt_at is None

"""The picture of an order, and the line that follows an action, as pure functions of the timeline."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.console.follow_up import follow
from app.console.story import NARROWEST_PERCENT, Picture, draw, explain_reason
from app.operations.timeline import TimelineAnswer, TimelineEntry
from app.operations.why_stuck import WhyStuck
from app.orders.model import Reason, rfc3339

START = datetime(2026, 1, 1, tzinfo=UTC)
PLACED = TimelineEntry(id="placed", at=rfc3339(START), source="request", event="order-placed")


def at(seconds: float) -> str:
    return rfc3339(START + timedelta(seconds=seconds))


def entry(id_: str, after: float, source: str, event: str, **more: Any) -> TimelineEntry:
    return TimelineEntry(id=id_, at=at(after), source=source, event=event, **more)


def attempt(
    number: int, start: float, outcome: str = "", seconds: float = 1, action: str = "do"
) -> list[TimelineEntry]:
    """Return an attempt to charge, and its answer if there is one."""
    call: dict[str, Any] = {"step": "charge_payment", "attempt": number}
    begun = entry(f"{number}1", start, "saga", action, outcome="attempted", **call)
    answer = entry(f"{number}2", start + seconds, "saga", action, outcome=outcome, seconds=seconds, **call)
    return [begun, answer] if outcome else [begun]


def story(*entries: TimelineEntry, status: str = "pending", **stuck: Any) -> TimelineAnswer:
    why = WhyStuck(message="x", waiting_for="payment", **stuck) if stuck else None
    return TimelineAnswer(order_id="x", status=status, entries=[PLACED, *entries], why_stuck=why)


def told(picture: Picture) -> list[str]:
    """Return the rows in short: `failed: charge_payment unknown`."""
    return [f"{row.state}: {row.title}" + (f" {row.outcome}" if row.outcome else "") for row in picture.rows]


def test_an_attempt_and_its_answer_are_one_row() -> None:
    """Its bar is from the start of the call to its answer, on an axis from the first to the last instant."""
    picture = draw(story(*attempt(1, 4, "done", 4)))
    assert told(picture) == ["note: Order placed", "done: charge_payment done"]
    [bar] = picture.rows[1].bars
    assert (bar.left, bar.width, bar.kind) == (50, 50, "done")
    assert [(tick.left, tick.seconds) for tick in picture.ticks] == [(0, 0), (25, 2), (50, 4), (75, 6), (100, 8)]


def test_an_attempt_without_an_answer_is_now_if_it_is_the_last() -> None:
    """Of an earlier one, the process stopped. An order that has ended has no present."""
    begun = attempt(1, 1) + attempt(2, 9)
    assert told(draw(story(*begun)))[1:] == ["failed: charge_payment unknown", "now: charge_payment now"]
    assert draw(story(*begun)).rows[-1].bars[0].left == pytest.approx(90)
    assert told(draw(story(*begun, status="rejected")))[-1] == "failed: charge_payment unknown"


def test_an_answer_whose_attempt_is_too_old_to_be_read_is_shown() -> None:
    """The start of the call follows from how long it took."""
    _, answer = attempt(501, 4, "unknown", 4)
    [bar] = draw(story(answer)).rows[1].bars
    assert (bar.left, bar.width) == (50, 50)


def test_many_failed_attempts_are_folded() -> None:
    """The first and the last two keep their rows; bars that nobody can tell apart are one."""
    entries = [one for number in range(1, 1001) for one in attempt(number, 10 * number, "unknown")]
    picture = draw(story(*entries, since=at(10), next_attempt_at=at(10_010)))
    assert told(picture) == [
        "note: Order placed",
        "failed: charge_payment unknown",
        "failed: charge_payment, 997 more attempts",
        "failed: charge_payment unknown",
        "failed: charge_payment unknown",
        "now: Waits for payment",
    ]
    assert picture.rows[2].detail == "997 × unknown"
    assert len(picture.rows[2].bars) <= 201
    assert [row.attempt for row in picture.rows[3:5]] == [999, 1000]


def test_an_undo_is_not_folded_with_its_do() -> None:
    """Attempts of another call begin a new run, and so does what an operator did between them."""
    failed = [one for number in (1, 2, 3) for one in attempt(number, number, "unknown", 0.1)]
    undone = [one for number in (1, 2) for one in attempt(number, number + 5, "unknown", 0.1, action="undo")]
    act = entry("act-1", 9, "operator", "retry", outcome="due", detail="ada: why")
    again = attempt(3, 10, "unknown", 0.1, action="undo")
    rows = told(draw(story(*failed, *undone, act, *again)))
    assert rows.count("failed: charge_payment unknown") == 3
    undo = "failed: undo charge_payment unknown"
    assert rows[4:] == [undo, undo, "operator: Retry due", undo]


def test_events_and_pauses_are_one_row_each() -> None:
    """An unpublished event and a pause in force reach to the end of the axis."""
    placed = "orders.order.placed.v1"
    entries = [
        entry("event-1", 0, "outbox", "event-written", detail=placed),
        entry("publish-1", 2, "broker", "event-published", detail=placed, seconds=2),
        entry("pause-3", 4, "operator", "partner-paused", detail="payment until later: why"),
        entry("resume-3", 6, "operator", "partner-resumed", detail="payment"),
        entry("event-2", 9, "outbox", "event-written", detail="orders.order.confirmed.v1"),
    ]
    picture = draw(story(*entries))
    assert told(picture)[1:] == [
        "note: Event order.placed published",
        "operator: Partner paused",
        "note: Event order.confirmed waiting",
    ]
    assert (picture.rows[2].seconds, picture.rows[2].detail) == (2, "payment until later: why")
    assert [row.bars[0].left + row.bars[0].width for row in picture.rows[1:]] == pytest.approx([20, 60, 100])


def test_a_replaced_pause_ends_where_the_next_begins() -> None:
    """Each is a row of its own; only the last one reaches to the end of the axis."""
    entries = [
        entry("pause-3", 1, "operator", "partner-paused", detail="payment until later: why"),
        entry("resume-3", 5, "operator", "partner-pause-replaced", detail="payment"),
        entry("pause-4", 5, "operator", "partner-paused", detail="payment until soon: why"),
        entry("undo", 9, "saga", "compensation-started"),
    ]
    _, first, second, _ = draw(story(*entries)).rows
    assert (first.detail, first.seconds) == ("payment until later: why", 4)
    assert (second.detail, second.seconds) == ("payment until soon: why", None)
    assert [row.bars[0].left + row.bars[0].width for row in (first, second)] == pytest.approx([50, 100])


def test_every_bar_can_be_seen_and_is_inside() -> None:
    """What takes no time, also at the end of the axis, has a bar."""
    entries = [entry("saga", 3600, "saga", "saga-started"), *attempt(1, 0, "done", 0)]
    for row in draw(story(*entries)).rows:
        assert row.bars[0].width >= NARROWEST_PERCENT
        assert row.bars[0].left + row.bars[0].width <= 100


def test_a_reason_of_a_newer_release_is_shown_as_it_is() -> None:
    """Every reason of this release is told in words."""
    assert all(explain_reason(reason) != reason for reason in Reason)
    assert explain_reason("moon-is-full") == "moon-is-full"


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("due-already", "nothing was changed: it was due already"),
        ("refused", "nothing was changed: it had ended, or not started"),
        ("ended-before", "nothing was changed: it had ended already"),
        ("nothing-matched", "nothing was changed: no message matched"),
        ("failed: broker-unavailable", "failed: broker-unavailable, nothing is known to have changed"),
    ],
)
def test_an_action_without_effect_says_so(outcome: str, said: str) -> None:
    """Nothing that follows is taken for its effect. An action that failed is not shown as under way."""
    act = entry("act-1", 1, "operator", "retry", outcome=outcome, detail="ada: why")
    chain = follow(story(act, *attempt(1, 2, "done")))
    assert [link.text for link in chain] == ["retry asked", said]


def test_the_last_action_is_followed_to_the_end() -> None:
    """Failures of one call are counted, what came before is left out, and the end is the last link."""
    entries = [
        *attempt(1, 1, "done"),
        entry("act-1", 2, "operator", "retry", outcome="due", detail="ada: one"),
        entry("act-2", 3, "operator", "compensate", outcome="turns-back", detail="ada: two"),
        entry("undo", 4, "saga", "compensation-started"),
        *attempt(1, 5, "unknown", action="undo"),
        *attempt(2, 7, "not-sent", action="undo"),
        *attempt(3, 9, "done", action="undo"),
        entry("end", 11, "order", "order-rejected", outcome="rejected"),
        entry("publish-2", 12, "broker", "event-published", detail="orders.order.rejected.v1"),
    ]
    chain = follow(story(*entries, status="rejected"))
    assert [link.text for link in chain] == [
        "compensate asked", "starts to undo", "undo charge_payment failed × 2", "charge_payment undone", "rejected",
    ]  # fmt: skip
    assert (chain[0].by, chain[0].at, chain[2].at) == ("ada: two", at(3), at(8))
    assert follow(story(*attempt(1, 1, "done"))) == []


def test_a_long_chain_is_cut_in_the_middle() -> None:
    """The action stays, and so does what the order waits for."""
    act = entry("act-1", 0, "operator", "retry", outcome="due", detail="ada: why")
    calls = [one for number in range(20) for one in attempt(number, number, "done" if number % 2 else "unknown")]
    chain = follow(story(act, *calls, since=at(1), next_attempt_at=None))
    assert [chain[0].text, chain[3].text, chain[-1].text] == ["retry asked", "…", "waits for payment"]
    assert len(chain) == 10

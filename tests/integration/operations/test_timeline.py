"""The story of an order, read from the rows that record it."""

from uuid import UUID

import pytest

from app.errors import OrderNotFound
from app.operations import timeline
from app.operations.timeline import Position, TimelineAnswer, TimelineEntry, unseen
from tests.harness.operating import compensate
from tests.harness.orders import TENANT, placed, retry_undo, start_saga
from tests.harness.queues import CONSUMER
from tests.harness.sagas import Stage
from tests.harness.sandboxes import set_faults

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLS = ["reserve_inventory", "charge_payment", "commit_inventory", "create_shipment"]


async def read(stage: Stage, order_id: UUID) -> TimelineAnswer:
    return await timeline.read(stage.pool, order_id, TENANT, CONSUMER)


def told(entries: list[TimelineEntry]) -> list[str]:
    """Return the story in words: `do charge_payment 1 done`, `order-placed`."""
    return [
        " ".join(str(part) for part in (entry.event, entry.step, entry.attempt, entry.outcome) if part)
        for entry in entries
    ]


async def test_an_order_without_a_saga_has_its_whole_plan_to_come(stage: Stage) -> None:
    """The story starts with the request and its event; every step is planned."""
    order = await placed(stage.pool, trace={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    answer = await read(stage, order.id)
    assert told(answer.entries) == ["order-placed", "event-written", *(f"do {step} planned" for step in CALLS)]
    assert {entry.trace_id for entry in answer.entries if entry.at} == {TRACE}
    assert answer.why_stuck is None


async def test_a_confirmed_order_tells_every_call(stage: Stage) -> None:
    """Start and outcome of each call are two entries; the outcome has how long it took."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    answer = await read(stage, saga)
    assert told(answer.entries) == [
        "order-placed",
        "event-written",
        "saga-started",
        *(f"do {step} 1 {outcome}" for step in CALLS for outcome in ("attempted", "done")),
        "event-written",
        "order-confirmed confirmed",
    ]
    outcomes = [entry for entry in answer.entries if entry.outcome == "done"]
    assert all(entry.seconds is not None and entry.seconds >= 0 for entry in outcomes)
    assert (answer.status, answer.why_stuck) == ("confirmed", None)


async def test_a_failing_undo_shows_what_is_still_to_come(stage: Stage) -> None:
    """While it compensates, the undos that follow are planned, and the last answer is named."""
    saga = await start_saga(stage.pool)
    await set_faults(
        stage.http, {"target": "shipping.create", "kind": "refuse"}, {"target": "payment.refund", "kind": "error"}
    )
    await stage.orchestrator().run_once()
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    answer = await read(stage, saga)
    story = told(answer.entries)
    assert story.index("do create_shipment 1 refused") < story.index("compensation-started")
    assert story[-2:] == ["undo charge_payment 1 unknown", "undo reserve_inventory planned"]
    assert answer.why_stuck is not None
    assert answer.why_stuck.waiting_for == "payment"
    assert "the undo of charge_payment (attempt 1)" in answer.why_stuck.message
    await set_faults(stage.http)
    await stage.drive()
    assert (await read(stage, saga)).why_stuck is None


async def test_operators_and_cancels_are_part_of_the_story(stage: Stage) -> None:
    """What an operator did stands there, with who and why."""
    saga = await start_saga(stage.pool)
    await compensate(stage.pool, saga)
    await stage.drive()
    answer = await read(stage, saga)
    [act] = [entry for entry in answer.entries if entry.source == "operator"]
    assert act.event == "compensate"
    assert act.detail
    assert "cancel-requested" in told(answer.entries)
    assert told(answer.entries)[-1] == "order-rejected rejected"


async def test_an_entry_never_changes_and_none_is_missed(stage: Stage) -> None:
    """Read after each step of a failing order: entries stay, and a reader that resumes gets each of them once."""
    saga = await start_saga(stage.pool)
    await set_faults(
        stage.http,
        {"target": "payment.charge", "kind": "error", "times": 2},
        {"target": "shipping.create", "kind": "refuse"},
        {"target": "payment.refund", "kind": "timeout_after", "times": 1},
    )
    seen: dict[str, TimelineEntry] = {}
    position = Position()
    runner = stage.orchestrator()
    while not position.is_at_end:
        entries = await timeline.read_entries(stage.pool, saga, TENANT, CONSUMER)
        assert {entry.id: entry for entry in entries if entry.id in seen} == seen
        for entry in unseen(entries, Position.parse(str(position))):
            assert entry.id not in seen
            position = position.after(entry)
            seen[entry.id] = entry
        await stage.let_time_pass()
        await runner.run_once()
    final = await timeline.read_entries(stage.pool, saga, TENANT, CONSUMER)
    assert {entry.id for entry in final} == set(seen)


async def test_a_clock_set_back_hides_no_entry(stage: Stage) -> None:
    """The log keeps its own order, so a position never skips a row of it."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    await stage.pool.execute("UPDATE saga_steps SET at = at - interval '1 hour' WHERE step = 'create_shipment'")
    entries = await timeline.read_entries(stage.pool, saga, TENANT, CONSUMER)
    numbers = [int(entry.id) for entry in entries if entry.id.isdecimal()]
    assert numbers == sorted(numbers)


async def test_a_long_log_changes_no_entry(stage: Stage) -> None:
    """Old calls disappear from a log of more than MAX_STEPS rows; no entry that is still shown changes."""
    saga = await start_saga(stage.pool)
    await set_faults(
        stage.http, {"target": "shipping.create", "kind": "refuse"}, {"target": "payment.refund", "kind": "error"}
    )
    await stage.orchestrator().run_once()
    before = {entry.id: entry for entry in await timeline.read_entries(stage.pool, saga, TENANT, CONSUMER)}
    await retry_undo(stage.pool, saga, timeline.MAX_STEPS)
    after = {entry.id: entry for entry in await timeline.read_entries(stage.pool, saga, TENANT, CONSUMER)}
    shown = before.keys() & after.keys()
    assert "undo" in shown
    assert {id_: after[id_] for id_ in shown} == {id_: before[id_] for id_ in shown}


async def test_a_saga_of_a_newer_release_is_shown(stage: Stage) -> None:
    """Its plan is unknown here: the story has what happened, and no steps to come."""
    saga = await start_saga(stage.pool)
    await stage.pool.execute("UPDATE sagas SET plan_version = 99")
    answer = await read(stage, saga)
    assert told(answer.entries) == ["order-placed", "event-written", "saga-started"]


async def test_an_order_whose_event_is_gone_is_stuck(stage: Stage) -> None:
    """Without its outbox row and its saga, only an operator can end it."""
    order = await placed(stage.pool)
    await stage.pool.execute("DELETE FROM outbox")
    await stage.pool.execute("UPDATE orders SET placed_at = placed_at - interval '1 min'")
    answer = await read(stage, order.id)
    assert answer.why_stuck is not None
    assert answer.why_stuck.waiting_for == "operator"
    assert f"orders saga compensate {order.id}" in answer.why_stuck.message


async def test_another_tenants_order_has_no_story(stage: Stage) -> None:
    """It is not found, as if it did not exist."""
    order = await placed(stage.pool, tenant="other")
    with pytest.raises(OrderNotFound):
        await read(stage, order.id)

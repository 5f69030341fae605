"""For every answer of the partners: how the order ends, and what the partners' ledger says then."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from app.orders.model import Line
from app.partners.ports import Unknown
from tests.harness.orders import start_saga
from tests.harness.sagas import ScriptedPayment, Stage
from tests.harness.sandboxes import Partners, entries, set_faults
from tests.harness.steps import DO, UNDO, undo_of

DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
UNCLEAR = ("timeout_before", "timeout_after", "reset_before", "reset_after", "garbage", "error", "unavailable")
UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}

REFUSALS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "out-of-stock": (
        {"lines": (Line("WIDGET", 1, 5), Line("OUT-OF-STOCK", 1, 999))},
        [],
        ["inventory.hold refused", "inventory.release nothing-to-undo"],
    ),
    "card-declined": (
        {"payment_method": "pm_card_declined"},
        [],
        ["inventory.hold done", "payment.charge refused", "payment.refund nothing-to-undo", "inventory.release done"],
    ),
    "hold-expired": (
        {},
        [{"target": "inventory.commit", "kind": "refuse"}],
        ["inventory.hold done", "payment.charge done", "inventory.commit refused", "payment.refund done",
         "inventory.release done"],
    ),
    "undeliverable": (
        UNDELIVERABLE,
        [],
        ["inventory.hold done", "payment.charge done", "inventory.commit done", "shipping.create refused",
         "shipping.cancel nothing-to-undo", "payment.refund done", "inventory.release done"],
    ),
}  # fmt: skip


async def fault(stage: Stage, kind: str, *targets: str, times: int | None = None) -> None:
    await set_faults(stage.http, *({"target": target, "kind": kind, "times": times} for target in targets))


async def events(stage: Stage) -> list[tuple[str, int]]:
    rows = await stage.pool.fetch("SELECT type, sequence FROM outbox ORDER BY sequence")
    return [(row["type"], row["sequence"]) for row in rows]


async def test_one_run_confirms_an_order(stage: Stage) -> None:
    """If all partners agree, one run takes the order from placed to confirmed."""
    saga = await start_saga(stage.pool, shipping_address={"name": "Ada"}, payment_method="pm_card_visa")
    assert await stage.orchestrator().run_once() == 1
    order = await stage.order(saga)
    assert (order.status, order.status_reason, order.version) == ("confirmed", None, 2)
    assert (order.tracking_id or "").startswith("trk_")
    assert await stage.ledger(saga) == [f"{operation} done" for operation in DO]
    assert await stage.standing(saga) == DONE
    assert await events(stage) == [("orders.order.placed.v1", 1), ("orders.order.confirmed.v1", 2)]
    row = await stage.saga(saga)
    assert (row["step"], row["direction"], row["lease_owner"], row["finished_at"] is None) == (
        None, "forward", None, False,
    )  # fmt: skip
    assert await stage.orchestrator().run_once() == 0


async def test_attempts_and_outcomes_are_logged(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await fault(stage, "error", "payment.charge", times=1)
    await stage.drive()
    assert await stage.log(saga) == [
        "do reserve_inventory 1 attempted",
        "do reserve_inventory 1 done",
        "do charge_payment 1 attempted",
        "do charge_payment 1 unknown",
        "do charge_payment 2 attempted",
        "do charge_payment 2 done",
        "do commit_inventory 1 attempted",
        "do commit_inventory 1 done",
        "do create_shipment 1 attempted",
        "do create_shipment 1 done",
    ]
    [detail] = await stage.pool.fetch("SELECT detail FROM saga_steps WHERE outcome = 'unknown'")
    assert detail["detail"] == "500 partner-error"


@pytest.mark.parametrize("reason", REFUSALS)
async def test_refusal_undoes_everything_in_reverse(stage: Stage, reason: str) -> None:
    """The order ends rejected, and the refused step is undone too."""
    changes, faults, ledger = REFUSALS[reason]
    saga = await start_saga(stage.pool, **changes)
    await set_faults(stage.http, *faults)
    assert await stage.orchestrator().run_once() == 1
    assert await stage.outcome(saga) == f"rejected: {reason}"
    assert await stage.ledger(saga) == ledger
    assert await stage.standing(saga) == UNDONE
    assert await events(stage) == [("orders.order.placed.v1", 1), ("orders.order.rejected.v1", 3)]


@pytest.mark.parametrize("reason", REFUSALS)
async def test_compensating_until_everything_is_undone(stage: Stage, reason: str) -> None:
    """The order is never shown as rejected while an undo is missing."""
    changes, faults, _ = REFUSALS[reason]
    saga = await start_saga(stage.pool, **changes)
    await set_faults(stage.http, *faults, {"target": "inventory.release", "kind": "error"})
    for _ in range(3):
        await stage.let_time_pass()
        await stage.orchestrator().run_once()
        assert await stage.outcome(saga) == f"compensating: {reason}"
    assert await events(stage) == [("orders.order.placed.v1", 1)]
    await set_faults(stage.http)
    await stage.drive()
    assert await stage.outcome(saga) == f"rejected: {reason}"
    assert await stage.standing(saga) == UNDONE


@pytest.mark.parametrize("kind", [*UNCLEAR, "duplicate"])
async def test_unclear_answers_are_retried_with_the_same_key(
    stage: Stage, partners_at: Callable[..., Partners], sandbox_url: str, kind: str
) -> None:
    """Nothing happens twice at the partner, and the order is confirmed."""
    saga = await start_saga(stage.pool)
    await fault(stage, kind, *DO, times=2)
    impatient = partners_at(sandbox_url, 0.2 if kind.startswith("timeout") else 20.0)
    await stage.drive(stage.orchestrator(partners=impatient))
    assert await stage.outcome(saga) == "confirmed"
    assert await stage.standing(saga) == DONE
    told = await entries(stage.http, saga)
    for operation in DO:
        of_it = [each for each in told if each["operation"] == operation]
        assert (len(of_it) >= 2, len({each["key"] for each in of_it})) == (True, 1)
        assert [each["applied"] for each in of_it].count(True) == 1


@pytest.mark.parametrize("kind", UNCLEAR)
async def test_undos_are_retried_in_order(
    stage: Stage, partners_at: Callable[..., Partners], sandbox_url: str, kind: str
) -> None:
    """Each undo is retried until it succeeds, and the next one starts only then."""
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await fault(stage, kind, *UNDO, times=2)
    impatient = partners_at(sandbox_url, 0.2 if kind.startswith("timeout") else 20.0)
    await stage.drive(stage.orchestrator(partners=impatient))
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE
    operations = [each["operation"] for each in await entries(stage.http, saga)]
    undone = [operation for operation in operations if operation in UNDO]
    assert undone == sorted(undone, key=UNDO.index)
    assert all(undone.count(operation) >= 3 for operation in UNDO)


async def test_undos_are_retried_after_the_deadline(stage: Stage) -> None:
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await fault(stage, "error", "payment.refund", times=20)
    await stage.orchestrator().run_once()
    await stage.let_the_deadline_pass()
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE


async def test_unreachable_partner_only_delays(
    stage: Stage, partners_at: Callable[..., Partners], free_port: int
) -> None:
    """The attempt is recorded as not sent, and the order is confirmed once the partner is reachable."""
    saga = await start_saga(stage.pool)
    nowhere = partners_at(f"http://127.0.0.1:{free_port}")
    await stage.orchestrator(partners=nowhere).run_once()
    assert await stage.log(saga) == ["do reserve_inventory 1 attempted", "do reserve_inventory 1 not-sent"]
    assert await stage.outcome(saga) == "pending"
    await stage.drive()
    assert await stage.outcome(saga) == "confirmed"


async def test_retry_after_is_kept_with_jitter_on_top(stage: Stage) -> None:
    """A Retry-After counts in full, even if it is longer than the cap of the retries."""
    saga = await start_saga(stage.pool)
    await fault(stage, "unavailable", "payment.charge")  # with Retry-After: 1
    await stage.orchestrator(retry_cap_seconds=0.05).run_once()
    row = await stage.saga(saga)
    assert (row["step"], row["attempts"], row["lease_owner"]) == ("charge_payment", 1, None)
    assert 1 < row["pause_seconds"] <= 1.05


async def test_retry_after_does_not_outlast_the_deadline(stage: Stage) -> None:
    """A long Retry-After does not delay the start of compensating."""
    saga = await start_saga(stage.pool)
    await stage.let_the_deadline_pass(in_seconds=60)
    busy = ScriptedPayment(stage.partners.payment, Unknown("429 busy", retry_after_seconds=300))
    await stage.orchestrator(payment=busy).run_once()
    row = await stage.saga(saga)
    assert timedelta(seconds=-1) < row["next_attempt_at"] - row["deadline_at"] < timedelta(seconds=60)  # not 240


async def test_saga_late_at_its_start_calls_no_partner(stage: Stage) -> None:
    """The order is rejected without a call."""
    saga = await start_saga(stage.pool)
    await stage.let_the_deadline_pass()
    await stage.orchestrator().run_once()
    assert await stage.outcome(saga) == "rejected: timed-out"
    assert (await stage.log(saga), await stage.ledger(saga)) == ([], [])
    assert await events(stage) == [("orders.order.placed.v1", 1), ("orders.order.rejected.v1", 3)]


@pytest.mark.parametrize("unclear", DO)
async def test_deadline_undoes_every_attempted_step(stage: Stage, unclear: str) -> None:
    """That includes a step whose answer was lost."""
    saga = await start_saga(stage.pool)
    await fault(stage, "reset_after", unclear)  # done, but the answer is lost
    await stage.orchestrator().run_once()
    assert await stage.outcome(saga) == "pending"
    await stage.let_the_deadline_pass()
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: timed-out"
    assert await stage.standing(saga) == UNDONE
    attempted = DO[: DO.index(unclear) + 1]
    expected = [f"{undo} done" for undo in map(undo_of, reversed(attempted)) if undo is not None]
    assert (await stage.ledger(saga))[len(attempted) :] == expected


async def test_ends_and_calls_are_counted(stage: Stage) -> None:
    value = stage.signals.value
    for changes in ({}, {"payment_method": "pm_card_declined"}):
        await start_saga(stage.pool, **changes)
    await fault(stage, "error", "payment.refund", times=2)
    await stage.drive()
    assert stage.events == 2
    assert value("orders_finished_total", {"status": "confirmed", "reason": ""}) == 1
    assert value("orders_finished_total", {"status": "rejected", "reason": "card-declined"}) == 1
    assert value("saga_duration_seconds_count") == 2
    assert value("saga_compensation_failed_total", {"step": "charge_payment"}) == 2
    calls = {
        ("reserve_inventory", "do", "done"): 2,
        ("charge_payment", "do", "done"): 1,
        ("charge_payment", "do", "refused"): 1,
        ("commit_inventory", "do", "done"): 1,
        ("create_shipment", "do", "done"): 1,
        ("charge_payment", "undo", "unknown"): 2,
        ("charge_payment", "undo", "done"): 1,
        ("reserve_inventory", "undo", "done"): 1,
        ("create_shipment", "undo", "done"): 0,
    }
    for (step, action, outcome), count in calls.items():
        labels = {"step": step, "action": action, "outcome": outcome}
        assert value("saga_step_duration_seconds_count", labels) == count, labels

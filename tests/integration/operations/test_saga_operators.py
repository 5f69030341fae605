"""Operators end pauses and make sagas compensate, with the limits of a cancel. Each action is recorded."""

import asyncio
from uuid import uuid4

import pytest

from app.db import Pool
from app.errors import OrderNotCancellable, OrderNotFound, SagaNotRetriable
from app.operations.sagas import ActionOutcome
from app.orders import events
from tests.harness.acting import ActAt
from tests.harness.cancelling import cancel, cancel_under_way
from tests.harness.operating import OPERATOR, audit_rows, compensate, recorded, retry
from tests.harness.orders import placed, somebody_waits, start_saga
from tests.harness.sagas import GatedPayment, Stage, dies_at
from tests.harness.sandboxes import set_faults
from tests.harness.steps import FORWARD
from tests.harness.wait import AMPLE_SECONDS, wait_until

COMPENSATED = "rejected: compensated-by-operator"
DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
CHARGE_FAILS = {"target": "payment.charge", "kind": "unavailable"}
LONG_SECONDS = 3600


async def lengthen_pauses(pool: Pool) -> None:
    """Make every pause long."""
    await pool.execute(
        f"UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '{LONG_SECONDS} s'"  # noqa: S608 - a number
    )


async def list_events(pool: Pool) -> list[str]:
    return [row["type"] for row in await pool.fetch("SELECT type FROM outbox ORDER BY sequence")]


@pytest.mark.parametrize(
    ("failing", "turned", "end"),
    [("payment.charge", False, "confirmed"), ("payment.refund", True, "rejected: timed-out")],
    ids=["forward", "backward"],
)
async def test_retry_ends_a_pause(stage: Stage, failing: str, turned: bool, end: str) -> None:
    """The saga is due at once, forward and backward."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": failing, "kind": "error"}, *([CHARGE_FAILS] if turned else []))
    await stage.orchestrator().run_once()
    if turned:
        await stage.let_the_deadline_pass()
        await stage.let_time_pass()
        await stage.orchestrator().run_once()
    await lengthen_pauses(stage.pool)
    await set_faults(stage.http)
    assert await stage.orchestrator().run_once() == 0
    assert await retry(stage.pool, saga) is ActionOutcome.DUE
    assert await stage.orchestrator().run_once() == 1
    assert await stage.outcome(saga) == end
    assert await audit_rows(stage.pool) == [(OPERATOR.name, "retry", saga, OPERATOR.reason, "due")]


async def test_retry_of_a_due_saga_changes_nothing(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    before = await stage.saga(saga)
    assert await retry(stage.pool, saga) is ActionOutcome.DUE_ALREADY
    assert await stage.saga(saga) == before


async def test_retry_does_not_touch_a_lease(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    driving = asyncio.create_task(stage.orchestrator("another", payment=payment).run_once())
    await payment.arrived.wait()
    before = await stage.saga(saga)
    assert await retry(stage.pool, saga) is ActionOutcome.UNDER_WAY
    assert await stage.saga(saga) == before
    assert before["lease_owner"] == "another"
    assert await stage.orchestrator("one").run_once() == 0
    payment.gate.set()
    await driving
    assert await stage.outcome(saga) == "confirmed"
    assert await recorded(stage.pool) == ["retry under-way"]


async def test_retry_after_a_crash(
    stage: Stage,
) -> None:
    """The saga is due when the lease of the dead runner has expired."""
    saga = await start_saga(stage.pool)
    await stage.orchestrator("dead", checkpoint=dies_at(FORWARD[2])).run_once()
    assert await retry(stage.pool, saga) is ActionOutcome.UNDER_WAY
    await stage.let_time_pass()
    assert await retry(stage.pool, saga) is ActionOutcome.DUE_ALREADY


async def test_final_and_unstarted_orders_cannot_be_retried(stage: Stage) -> None:
    """The refusal is recorded."""
    ended, unstarted = await start_saga(stage.pool), (await placed(stage.pool)).id
    await stage.drive()
    for order_id, why in ((ended, "the order is confirmed"), (unstarted, "the saga has not started")):
        with pytest.raises(SagaNotRetriable, match=why):
            await retry(stage.pool, order_id)
    assert [row[2:] for row in await audit_rows(stage.pool)] == [
        (order_id, OPERATOR.reason, "refused") for order_id in (ended, unstarted)
    ]


async def test_unknown_order_leaves_no_record(stage: Stage) -> None:
    for act in (retry, compensate):
        with pytest.raises(OrderNotFound):
            await act(stage.pool, uuid4())
    assert await audit_rows(stage.pool) == []


async def test_compensating_an_unstarted_order_cancels_it(stage: Stage) -> None:
    """The order is cancelled at once, and an event reports it."""
    order = await placed(stage.pool, tenant="default")
    assert await compensate(stage.pool, order.id) is ActionOutcome.CANCELLED
    assert await stage.outcome(order.id) == "cancelled: compensated-by-operator"
    assert await list_events(stage.pool) == [events.PLACED, events.PLACED.replace("placed", "cancelled")]
    assert await compensate(stage.pool, order.id) is ActionOutcome.ENDED_BEFORE
    assert await stage.pool.fetchval("SELECT count(*) FROM sagas") == 0


@pytest.mark.parametrize("point", FORWARD)
async def test_compensating_during_a_step(stage: Stage, database_url: str, point: str) -> None:
    """At any crash point, every attempted step is undone."""
    checkpoint = ActAt(database_url, point, compensate)
    saga = checkpoint.order_id = await start_saga(stage.pool)
    assert await stage.orchestrator(checkpoint=checkpoint).run_once() == 1
    assert checkpoint.answer is ActionOutcome.TURNS_BACK
    assert (await stage.outcome(saga), await stage.standing(saga)) == (COMPENSATED, UNDONE)
    assert await list_events(stage.pool) == [events.PLACED, events.PLACED.replace("placed", "rejected")]
    value = stage.signals.value
    assert value("orders_finished_total", {"status": "rejected", "reason": "compensated-by-operator"}) == 1


async def test_confirmed_order_stays_confirmed(stage: Stage, database_url: str) -> None:
    checkpoint = ActAt(database_url, "saga.finished", compensate)
    saga = checkpoint.order_id = await start_saga(stage.pool)
    await stage.orchestrator(checkpoint=checkpoint).run_once()
    assert isinstance(checkpoint.answer, OrderNotCancellable)
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("confirmed", DONE)
    assert await recorded(stage.pool) == ["compensate refused"]


async def test_compensating_ends_a_pause(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, CHARGE_FAILS)
    await stage.orchestrator().run_once()
    await lengthen_pauses(stage.pool)
    assert await compensate(stage.pool, saga) is ActionOutcome.TURNS_BACK
    assert await stage.orchestrator().run_once() == 1
    assert (await stage.outcome(saga), await stage.standing(saga)) == (COMPENSATED, UNDONE)


async def test_compensating_again_changes_nothing(stage: Stage) -> None:
    """A repeated command changes nothing before the saga compensates, while it does, and after its end."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, CHARGE_FAILS, {"target": "payment.refund", "kind": "error"})
    await stage.orchestrator().run_once()
    found = [await compensate(stage.pool, saga) for _ in range(2)]
    await stage.orchestrator().run_once()
    assert await stage.outcome(saga) == "compensating: compensated-by-operator"
    found.append(await compensate(stage.pool, saga))
    await set_faults(stage.http)
    await stage.drive()
    found.append(await compensate(stage.pool, saga))
    assert found == [
        ActionOutcome.TURNS_BACK,
        ActionOutcome.TURNED_BEFORE,
        ActionOutcome.TURNED_BEFORE,
        ActionOutcome.ENDED_BEFORE,
    ]
    assert await recorded(stage.pool) == [f"compensate {outcome}" for outcome in found]
    assert (await stage.outcome(saga), (await stage.order(saga)).version) == (COMPENSATED, 3)


@pytest.mark.parametrize("customer_first", [True, False])
async def test_first_cancel_gives_the_reason(stage: Stage, customer_first: bool) -> None:
    """Of a customer and an operator, the first one counts."""
    saga = await start_saga(stage.pool)
    if customer_first:
        await cancel(stage.pool, saga)
        assert await compensate(stage.pool, saga) is ActionOutcome.TURNED_BEFORE
    else:
        await compensate(stage.pool, saga)
        assert (await cancel(stage.pool, saga)).status == "pending"
    await stage.drive()
    assert await stage.outcome(saga) == ("cancelled: cancelled-by-customer" if customer_first else COMPENSATED)


async def test_recorded_cancel_of_an_older_release(stage: Stage) -> None:
    """A cancel without a reason is the customer's."""
    saga = await start_saga(stage.pool)
    await stage.pool.execute("UPDATE orders SET cancel_requested_at = clock_timestamp()")
    assert await compensate(stage.pool, saga) is ActionOutcome.TURNED_BEFORE
    await stage.drive()
    assert await stage.outcome(saga) == "cancelled: cancelled-by-customer"


async def test_refusal_keeps_its_reason(stage: Stage) -> None:
    saga = await start_saga(stage.pool, payment_method="pm_card_declined")
    await set_faults(stage.http, {"target": "payment.refund", "kind": "error"})
    await stage.orchestrator().run_once()
    assert await compensate(stage.pool, saga) is ActionOutcome.TURNED_BEFORE
    await set_faults(stage.http)
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: card-declined"
    with pytest.raises(OrderNotCancellable):
        await compensate(stage.pool, saga)


async def test_compensating_waits_for_a_concurrent_cancel(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    async with cancel_under_way(stage.pool, saga):
        compensating = asyncio.create_task(compensate(stage.pool, saga))
        await wait_until(lambda: somebody_waits(stage.pool), AMPLE_SECONDS, "the operator at the order")
    assert await compensating is ActionOutcome.TURNED_BEFORE


async def test_concurrent_operators_are_all_recorded(stage: Stage) -> None:
    """Only one of them changes the order."""
    saga = await start_saga(stage.pool)
    found = await asyncio.gather(*(compensate(stage.pool, saga) for _ in range(8)))
    assert sorted(found) == sorted([ActionOutcome.TURNS_BACK, *[ActionOutcome.TURNED_BEFORE] * 7])
    assert sorted(await recorded(stage.pool)) == sorted(f"compensate {outcome}" for outcome in found)
    await stage.drive()
    assert (await stage.outcome(saga), await stage.ledger(saga)) == (COMPENSATED, [])

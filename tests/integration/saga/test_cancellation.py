"""A cancel at any time in an order's life is refused, or the order ends with everything undone."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

import pytest

from app import db
from app.errors import DatabaseUnavailable, OrderNotCancellable, OrderNotFound
from app.messaging.consumer import Consumer, Handled
from app.messaging.envelope import Envelope
from app.observability.signals import Signals
from app.orders import events
from app.orders.model import Line
from app.saga import cancel as saga_cancel
from app.saga import start as saga_start
from tests.harness.cancelling import TRACE, CancelAt, cancel, cancel_under_way
from tests.harness.orders import (
    DEADLINE_SECONDS,
    TENANT,
    event_of,
    placed,
    somebody_waits,
    somebody_waits_alone,
    start_saga,
)
from tests.harness.sagas import GatedPayment, Stage, dies_at, running
from tests.harness.sandboxes import set_faults
from tests.harness.steps import BACKWARD, DO, FORWARD
from tests.harness.wait import AMPLE_SECONDS, wait_until

CANCELLED = "cancelled: cancelled-by-customer"
DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}


async def list_events(pool: db.Pool) -> list[tuple[str, int]]:
    """Return the events of the only order, as type and sequence."""
    rows = await pool.fetch("SELECT type, sequence FROM outbox ORDER BY sequence")
    return [(row["type"].split(".")[2], row["sequence"]) for row in rows]


def asked_to_do(ledger: list[str]) -> list[str]:
    return [line.split()[0] for line in ledger if line.split()[0] in DO]


async def deliver(pool: db.Pool, envelope: Envelope) -> object:
    """Deliver `order.placed` as a transport does."""

    async def start(conn: db.Connection, messages: Sequence[Envelope]) -> None:
        await saga_start.handle_order_placed(conn, messages, DEADLINE_SECONDS)

    consumer = Consumer(pool, "saga", {events.PLACED: start}, 1, Signals())
    return await consumer.handle(envelope)


async def test_unstarted_order_is_cancelled_at_once(stage: Stage) -> None:
    """An event reports it, with the trace of the cancel."""
    order = await placed(stage.pool)
    cancelled = await cancel(stage.pool, order.id)
    assert cancelled == await stage.order(order.id)
    assert (await stage.outcome(order.id), cancelled.version) == (CANCELLED, 2)
    assert await list_events(stage.pool) == [("placed", 1), ("cancelled", 2)]
    traced = await stage.pool.fetchval("SELECT traceparent FROM outbox WHERE sequence = 2")
    assert traced == TRACE["traceparent"]


async def test_message_after_the_cancel_starts_nothing(stage: Stage) -> None:
    """The message counts as handled."""
    order = await placed(stage.pool)
    await cancel(stage.pool, order.id)
    assert await deliver(stage.pool, event_of(order)) == Handled()
    assert await stage.pool.fetchval("SELECT count(*) FROM inbox WHERE processed_at IS NOT NULL") == 1
    assert await stage.pool.fetchval("SELECT count(*) FROM sagas") == 0
    assert await stage.orchestrator().run_once() == 0


async def test_cancelled_before_the_first_call(stage: Stage) -> None:
    """A saga that is cancelled before its first call makes none."""
    saga = await start_saga(stage.pool)
    assert (await cancel(stage.pool, saga)).status == "pending"
    assert await stage.orchestrator().run_once() == 1
    assert await stage.outcome(saga) == CANCELLED
    assert (await stage.log(saga), await stage.ledger(saga)) == ([], [])
    assert await list_events(stage.pool) == [("placed", 1), ("cancelled", 3)]


@pytest.mark.parametrize("point", FORWARD)
async def test_cancel_during_a_step(stage: Stage, database_url: str, point: str) -> None:
    """No further step starts, and every attempted step is undone."""
    checkpoint = CancelAt(database_url, point)
    saga = checkpoint.order_id = await start_saga(stage.pool)
    assert await stage.orchestrator(checkpoint=checkpoint).run_once() == 1
    assert checkpoint.status == "pending"
    assert await stage.outcome(saga) == CANCELLED
    assert await stage.standing(saga) == UNDONE
    asked = asked_to_do(await stage.ledger(saga))
    assert asked == list(DO[: FORWARD.index(point) // 2 + 1])
    assert await list_events(stage.pool) == [("placed", 1), ("cancelled", 3)]
    value = stage.signals.value
    assert value("orders_finished_total", {"status": "cancelled", "reason": "cancelled-by-customer"}) == 1


@pytest.mark.parametrize("point", FORWARD)
async def test_cancel_between_two_runners(stage: Stage, point: str) -> None:
    """The process that takes the saga over makes no further do, and undoes every attempted step."""
    saga = await start_saga(stage.pool)
    await stage.orchestrator("first", checkpoint=dies_at(point)).run_once()
    before = await stage.ledger(saga)
    assert (await cancel(stage.pool, saga)).status == "pending"
    assert await stage.orchestrator("second").run_once() == 0  # the lease has not expired
    await stage.drive(stage.orchestrator("second"))
    assert await stage.outcome(saga) == CANCELLED
    assert asked_to_do(await stage.ledger(saga)) == asked_to_do(before)
    assert set((await stage.standing(saga)).values()) == {0}


@pytest.mark.parametrize("unclear", DO)
async def test_cancel_ends_a_pause(stage: Stage, unclear: str) -> None:
    """The waiting saga is due at once, and compensates."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": unclear, "kind": "unavailable"})  # with Retry-After: 1
    await stage.orchestrator().run_once()
    assert await stage.outcome(saga) == "pending"
    before = await stage.ledger(saga)
    await cancel(stage.pool, saga)
    assert (await stage.saga(saga))["due"]
    await stage.orchestrator().run_once()
    assert await stage.outcome(saga) == CANCELLED
    assert asked_to_do(await stage.ledger(saga)) == asked_to_do(before)
    assert await stage.standing(saga) == UNDONE


@pytest.mark.parametrize("unclear", DO)
async def test_cancel_just_before_a_pause(stage: Stage, database_url: str, unclear: str) -> None:
    """The saga compensates at once instead of waiting."""
    checkpoint = CancelAt(database_url, FORWARD[2 * DO.index(unclear) + 1])
    saga = checkpoint.order_id = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": unclear, "kind": "unavailable"})
    await stage.orchestrator(checkpoint=checkpoint).run_once()
    assert await stage.outcome(saga) == CANCELLED
    assert await stage.standing(saga) == UNDONE


async def test_wake_up_compensates_a_waiting_saga(stage: Stage) -> None:
    """The cancel does not wait for the next poll."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": "payment.charge", "kind": "unavailable"})
    orchestrator = stage.orchestrator()

    async def it_pauses() -> bool:
        return (await stage.saga(saga))["lease_owner"] is None and len(await stage.log(saga)) > 0

    async def it_is_cancelled() -> bool:
        return await stage.outcome(saga) == CANCELLED

    async with running(orchestrator):
        await wait_until(it_pauses, AMPLE_SECONDS, "a pause")
        await cancel(stage.pool, saga)
        orchestrator.wake()
        await wait_until(it_is_cancelled, AMPLE_SECONDS, "end of the saga")


@pytest.mark.parametrize("point", BACKWARD)
async def test_cancel_of_a_refused_order(stage: Stage, database_url: str, point: str) -> None:
    """The cancel is accepted, and the order ends rejected with the partner's reason."""
    checkpoint = CancelAt(database_url, point)
    saga = checkpoint.order_id = await start_saga(stage.pool, **UNDELIVERABLE)
    await stage.orchestrator(checkpoint=checkpoint).run_once()
    assert checkpoint.status == "compensating"
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE


async def test_cancelled_order_compensates_until_all_is_undone(stage: Stage) -> None:
    """A repeated cancel is accepted meanwhile, and changes nothing."""
    saga = await start_saga(stage.pool)
    await set_faults(
        stage.http,
        {"target": "shipping.create", "kind": "error"},
        {"target": "inventory.release", "kind": "error"},
    )
    await stage.orchestrator().run_once()
    await cancel(stage.pool, saga)
    for _ in range(3):
        await stage.let_time_pass()
        await stage.orchestrator().run_once()
        assert (await cancel(stage.pool, saga)).status == "compensating"
        assert await list_events(stage.pool) == [("placed", 1)]
    await set_faults(stage.http)
    await stage.drive()
    assert (await stage.outcome(saga), await stage.standing(saga)) == (CANCELLED, UNDONE)
    assert (await cancel(stage.pool, saga)).status == "cancelled"


async def test_cancel_before_the_deadline_stays_the_reason(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error", "times": 1})
    await stage.orchestrator().run_once()
    await cancel(stage.pool, saga)
    await stage.let_the_deadline_pass()
    await stage.drive()
    assert await stage.outcome(saga) == CANCELLED


@pytest.mark.parametrize("changes", [{}, UNDELIVERABLE], ids=["confirmed", "rejected"])
async def test_final_orders_cannot_be_cancelled(
    stage: Stage, database_url: str, changes: dict[str, tuple[Line, ...]]
) -> None:
    checkpoint = CancelAt(database_url, "saga.finished")
    saga = checkpoint.order_id = await start_saga(stage.pool, **changes)
    await stage.orchestrator(checkpoint=checkpoint).run_once()
    ended = await stage.order(saga)
    assert isinstance(checkpoint.answer, OrderNotCancellable)
    assert (ended.status, ended.cancel_requested_at) == ("rejected" if changes else "confirmed", None)
    assert await stage.standing(saga) == (UNDONE if changes else DONE)
    with pytest.raises(OrderNotCancellable):
        await cancel(stage.pool, saga)
    assert await stage.order(saga) == ended


@pytest.mark.parametrize("started", [False, True])
async def test_concurrent_cancels_count_once(stage: Stage, started: bool) -> None:
    order_id = await start_saga(stage.pool) if started else (await placed(stage.pool)).id
    orders = await asyncio.gather(*(cancel(stage.pool, order_id) for _ in range(8)))
    assert all(order == orders[0] for order in orders)
    assert orders[0].status == ("pending" if started else "cancelled")
    await stage.drive()
    assert await stage.outcome(order_id) == CANCELLED
    assert [name for name, _ in await list_events(stage.pool)] == ["placed", "cancelled"]


async def test_start_waits_for_a_concurrent_cancel(stage: Stage) -> None:
    """The start then finds the order cancelled, and starts nothing."""
    order = await placed(stage.pool)
    async with cancel_under_way(stage.pool, order.id):
        starting = asyncio.create_task(deliver(stage.pool, event_of(order)))
        await wait_until(lambda: somebody_waits(stage.pool), AMPLE_SECONDS, "the start at the order")
    assert await starting == Handled()
    assert await stage.pool.fetchval("SELECT count(*) FROM sagas") == 0
    assert await stage.outcome(order.id) == CANCELLED


async def test_cancel_waits_for_a_concurrent_start(stage: Stage) -> None:
    """The cancel then finds the saga, which ends without a call."""
    order = await placed(stage.pool)
    async with stage.pool.acquire() as conn, conn.transaction():
        await saga_start.handle_order_placed(conn, [event_of(order)], DEADLINE_SECONDS)
        cancelling = asyncio.create_task(cancel(stage.pool, order.id))
        await wait_until(lambda: somebody_waits(stage.pool), AMPLE_SECONDS, "the cancel at the order")
    assert (await cancelling).status == "pending"
    await stage.drive()
    assert (await stage.outcome(order.id), await stage.ledger(order.id)) == (CANCELLED, [])


async def test_write_waits_for_a_concurrent_cancel(stage: Stage) -> None:
    """The runner's write then finds the cancel, and the saga compensates."""
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    driving = asyncio.create_task(stage.orchestrator(payment=payment).run_once())
    await payment.arrived.wait()
    async with cancel_under_way(stage.pool, saga):
        payment.gate.set()
        await wait_until(lambda: somebody_waits(stage.pool), AMPLE_SECONDS, "the record at the saga")
    await driving
    assert (await stage.outcome(saga), await stage.standing(saga)) == (CANCELLED, UNDONE)


async def test_cancel_behind_the_confirming_write_is_too_late(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    async with stage.pool.acquire() as conn, conn.transaction():
        await conn.execute("SELECT FROM orders WHERE id = $1 FOR UPDATE", saga)
        driving = asyncio.create_task(stage.orchestrator().run_once())
        await wait_until(lambda: somebody_waits_alone(stage.pool), AMPLE_SECONDS, "the last record at the order")
        assert asked_to_do(await stage.ledger(saga)) == list(DO)
        cancelling = asyncio.create_task(cancel(stage.pool, saga))
        await wait_until(lambda: two_wait(stage.pool), AMPLE_SECONDS, "the cancel behind it")
    await driving
    with pytest.raises(OrderNotCancellable):
        await cancelling
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("confirmed", DONE)


async def two_wait(pool: db.Pool) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(await pool.fetchval(waiting) == 2)


async def test_unknown_orders_and_other_tenants_are_not_found(stage: Stage) -> None:
    """Nothing changes."""
    order = await placed(stage.pool, tenant="other")
    for order_id in (order.id, uuid4()):
        with pytest.raises(OrderNotFound):
            await cancel(stage.pool, order_id)
    assert await stage.pool.fetchval("SELECT status FROM orders") == "pending"
    assert (await cancel(stage.pool, order.id, tenant="other")).status == "cancelled"


async def test_locked_order_is_temporarily_unavailable(stage: Stage) -> None:
    order = await placed(stage.pool)

    async def impatient() -> None:
        async with db.transaction(stage.pool) as conn:
            await conn.execute("SET LOCAL lock_timeout = '10ms'")
            await saga_cancel.cancel(conn, TENANT, order.id, {})

    async with cancel_under_way(stage.pool, order.id):
        with pytest.raises(DatabaseUnavailable):
            await impatient()

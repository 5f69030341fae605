"""If a runner dies, freezes, loses its lease or is stopped, another finishes its saga, and nothing happens twice."""

import asyncio

import pytest

from app.orders.model import Line
from tests.harness.orders import start_saga
from tests.harness.sagas import LEASE_SECONDS, GatedPayment, Stage, dies_at, running
from tests.harness.sandboxes import set_faults
from tests.harness.steps import BACKWARD, DO, FORWARD
from tests.harness.wait import AMPLE_SECONDS, wait_until

DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
CONFIRMED = [f"{operation} done" for operation in DO]


@pytest.mark.parametrize("point", FORWARD)
async def test_crash_forward_is_continued_by_another_process(stage: Stage, point: str) -> None:
    """After a crash at any point, another process confirms the order once the lease has expired."""
    saga = await start_saga(stage.pool)
    await stage.orchestrator("first", checkpoint=dies_at(point)).run_once()
    row = await stage.saga(saga)
    assert (row["lease_owner"], row["due"], row["finished_at"]) == ("first", False, None)
    assert row["pause_seconds"] <= LEASE_SECONDS  # then any process may claim it
    assert await stage.orchestrator("second").run_once() == 0  # the lease has not expired
    await stage.drive(stage.orchestrator("second"))
    assert await stage.outcome(saga) == "confirmed"
    assert await stage.standing(saga) == DONE
    assert [each for each in await stage.ledger(saga) if not each.endswith("replayed")] == CONFIRMED


@pytest.mark.parametrize("point", [*FORWARD, *BACKWARD])
async def test_crash_of_a_refused_saga_still_undoes_everything(stage: Stage, point: str) -> None:
    """Wherever the process dies, forward or backward, another one undoes every attempted step."""
    saga = await start_saga(stage.pool, lines=(Line("UNDELIVERABLE", 3, 999),))
    await stage.orchestrator("first", checkpoint=dies_at(point)).run_once()
    await stage.drive(stage.orchestrator("second"))
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE


async def test_crash_after_the_end_leaves_nothing_to_do(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await stage.orchestrator("first", checkpoint=dies_at("saga.finished")).run_once()
    await stage.drive(stage.orchestrator("second"))
    assert await stage.ledger(saga) == CONFIRMED
    assert await stage.pool.fetchval("SELECT count(*) FROM outbox") == 2


async def test_attempt_is_recorded_before_the_call(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    async with running(stage.orchestrator(payment=payment)):
        await payment.arrived.wait()
        assert (await stage.log(saga))[-1] == "do charge_payment 1 attempted"
        row = await stage.saga(saga)
        assert (row["step"], row["attempts"], row["lease_owner"], row["due"]) == ("charge_payment", 1, "one", False)
        assert await stage.ledger(saga) == ["inventory.hold done"]
        payment.gate.set()


async def test_frozen_runner_changes_nothing_after_confirmation(
    stage: Stage,
) -> None:
    """A runner that resumes after its lease cannot change what another one has confirmed."""
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    frozen = asyncio.create_task(stage.orchestrator("first", payment=payment).run_once())
    await payment.arrived.wait()
    await stage.drive(stage.orchestrator("second"))
    ended = (await stage.order(saga), await stage.saga(saga), await stage.log(saga), stage.events)
    payment.gate.set()
    await frozen
    assert (await stage.order(saga), await stage.saga(saga), await stage.log(saga), stage.events) == ended
    assert await stage.standing(saga) == DONE
    assert (await stage.ledger(saga))[-1] == "payment.charge replayed"


async def test_frozen_runner_charges_nothing_after_compensation(
    stage: Stage,
) -> None:
    """A charge that arrives after its undo has no effect."""
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    frozen = asyncio.create_task(stage.orchestrator("first", payment=payment).run_once())
    await payment.arrived.wait()
    await stage.let_the_deadline_pass()
    await stage.drive(stage.orchestrator("second"))
    payment.gate.set()
    await frozen
    assert await stage.outcome(saga) == "rejected: timed-out"
    assert await stage.standing(saga) == UNDONE
    assert (await stage.ledger(saga))[-2:] == ["inventory.release done", "payment.charge undone"]


async def test_only_the_new_lease_holder_runs_the_saga(stage: Stage) -> None:
    """The runner that lost its lease records nothing, even if its call succeeded."""
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    frozen = asyncio.create_task(stage.orchestrator("first", payment=payment).run_once())
    await payment.arrived.wait()
    await stage.let_time_pass()
    second = GatedPayment(stage.partners.payment)
    taking_over = asyncio.create_task(stage.orchestrator("second", payment=second).run_once())
    await second.arrived.wait()
    payment.gate.set()
    await frozen  # its charge succeeded, but only the second runner may record that
    assert await stage.log(saga) == [
        "do reserve_inventory 1 attempted",
        "do reserve_inventory 1 done",
        "do charge_payment 1 attempted",
        "do charge_payment 2 attempted",
    ]
    second.gate.set()
    await taking_over
    assert await stage.outcome(saga) == "confirmed"
    assert await stage.standing(saga) == DONE


async def test_concurrent_orchestrators_run_each_saga_once(stage: Stage) -> None:
    sagas = [await start_saga(stage.pool) for _ in range(6)]
    looks = await asyncio.gather(*(stage.orchestrator(owner).run_once() for owner in ("first", "second", "third")))
    await stage.drive()
    assert sum(looks) == 6
    for saga in sagas:
        assert await stage.ledger(saga) == CONFIRMED


async def test_stop_finishes_the_call_and_gives_the_saga_back(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    orchestrator = stage.orchestrator("first", payment=payment)
    async with running(orchestrator):
        await payment.arrived.wait()
        orchestrator.stop()
        payment.gate.set()
    row = await stage.saga(saga)
    assert (row["step"], row["attempts"], row["lease_owner"], row["due"]) == ("commit_inventory", 0, None, True)
    assert (await stage.log(saga))[-1] == "do charge_payment 1 done"
    assert await stage.ledger(saga) == CONFIRMED[:2]
    assert await stage.orchestrator("second").run_once() == 1
    assert await stage.outcome(saga) == "confirmed"


async def test_wake_up_runs_a_new_saga(stage: Stage) -> None:
    orchestrator = stage.orchestrator()
    async with running(orchestrator):
        saga = await start_saga(stage.pool)
        orchestrator.wake()

        async def it_is_confirmed() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(it_is_confirmed, AMPLE_SECONDS, "end of the saga")


async def test_waiting_saga_continues_without_a_poll(stage: Stage) -> None:
    """It continues when it is due, although the next poll is an hour away."""
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error", "times": 5})
    saga = await start_saga(stage.pool)
    async with running(stage.orchestrator()):

        async def it_is_confirmed() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(it_is_confirmed, AMPLE_SECONDS, "end of the saga")


async def test_concurrency_limit(stage: Stage) -> None:
    """No more sagas run at a time than allowed, and the others follow at once."""
    for _ in range(5):
        await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    async with running(stage.orchestrator(payment=payment, concurrency=2)):
        await wait_until(lambda: payment.waiting == 2, AMPLE_SECONDS, "two charges")
        assert await stage.pool.fetchval("SELECT count(*) FROM sagas WHERE lease_owner IS NOT NULL") == 2
        payment.gate.set()

        async def all_are_confirmed() -> bool:
            return await stage.pool.fetchval("SELECT count(*) = 5 FROM orders WHERE status = 'confirmed'") is True

        await wait_until(all_are_confirmed, AMPLE_SECONDS, "end of every saga")


async def test_reason_of_a_newer_release_is_kept(stage: Stage) -> None:
    """A saga that compensates for an unknown reason is undone, and its order shows that reason."""
    saga = await start_saga(stage.pool)
    await stage.orchestrator(checkpoint=dies_at("saga.charge_payment.do.answered")).run_once()
    await stage.pool.execute(
        "UPDATE orders SET cancel_requested_at = clock_timestamp(), cancel_reason = 'of-a-newer-release'"
    )
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: of-a-newer-release"
    assert await stage.standing(saga) == UNDONE

"""Sagas whose runner dies, freezes, loses its lease or is stopped: another one ends them, and nothing is doubled."""

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
async def test_whichever_point_forward_a_runner_dies_at_another_goes_on_from_there(stage: Stage, point: str) -> None:
    saga = await start_saga(stage.pool)
    await stage.orchestrator("first", checkpoint=dies_at(point)).run_once()
    row = await stage.saga(saga)
    assert (row["lease_owner"], row["due"], row["finished_at"]) == ("first", False, None)
    assert row["pause_seconds"] <= LEASE_SECONDS  # then it is anybody's
    assert await stage.orchestrator("second").run_once() == 0  # the lease still runs
    await stage.drive(stage.orchestrator("second"))
    assert await stage.outcome(saga) == "confirmed"
    assert await stage.standing(saga) == DONE
    assert [each for each in await stage.ledger(saga) if not each.endswith("replayed")] == CONFIRMED


@pytest.mark.parametrize("point", [*FORWARD, *BACKWARD])
async def test_whichever_point_of_a_saga_that_turns_back_a_runner_dies_at_everything_is_undone(
    stage: Stage, point: str
) -> None:
    saga = await start_saga(stage.pool, lines=(Line("UNDELIVERABLE", 3, 999),))
    await stage.orchestrator("first", checkpoint=dies_at(point)).run_once()
    await stage.drive(stage.orchestrator("second"))
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE


async def test_a_runner_that_dies_after_the_end_leaves_nothing_to_do(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await stage.orchestrator("first", checkpoint=dies_at("saga.finished")).run_once()
    await stage.drive(stage.orchestrator("second"))
    assert await stage.ledger(saga) == CONFIRMED
    assert await stage.pool.fetchval("SELECT count(*) FROM outbox") == 2


async def test_an_attempt_is_on_record_before_the_partner_is_asked(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    async with running(stage.orchestrator(payment=payment)):
        await payment.arrived.wait()
        assert (await stage.log(saga))[-1] == "do charge_payment 1 attempted"
        row = await stage.saga(saga)
        assert (row["step"], row["attempts"], row["lease_owner"], row["due"]) == ("charge_payment", 1, "one", False)
        assert await stage.ledger(saga) == ["inventory.hold done"]
        payment.gate.set()


async def test_a_runner_that_was_frozen_past_its_lease_changes_nothing_when_another_has_confirmed(
    stage: Stage,
) -> None:
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


async def test_a_runner_that_was_frozen_past_its_lease_charges_nobody_when_another_has_turned_back(
    stage: Stage,
) -> None:
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


async def test_a_saga_taken_over_between_two_writes_is_not_driven_by_both(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    frozen = asyncio.create_task(stage.orchestrator("first", payment=payment).run_once())
    await payment.arrived.wait()
    await stage.let_time_pass()
    second = GatedPayment(stage.partners.payment)
    taking_over = asyncio.create_task(stage.orchestrator("second", payment=second).run_once())
    await second.arrived.wait()
    payment.gate.set()
    await frozen  # its charge went through, but it is the second one that may say so
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


async def test_two_orchestrators_at_once_drive_each_saga_once(stage: Stage) -> None:
    sagas = [await start_saga(stage.pool) for _ in range(6)]
    looks = await asyncio.gather(*(stage.orchestrator(owner).run_once() for owner in ("first", "second", "third")))
    await stage.drive()
    assert sum(looks) == 6
    for saga in sagas:
        assert await stage.ledger(saga) == CONFIRMED


async def test_a_stopped_orchestrator_ends_its_call_and_gives_the_saga_back(stage: Stage) -> None:
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


async def test_an_orchestrator_that_is_woken_drives_what_was_just_started(stage: Stage) -> None:
    orchestrator = stage.orchestrator()
    async with running(orchestrator):
        saga = await start_saga(stage.pool)
        orchestrator.wake()

        async def it_is_confirmed() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(it_is_confirmed, AMPLE_SECONDS, "end of the saga")


async def test_a_saga_that_has_to_wait_goes_on_when_its_time_has_come_without_a_poll(stage: Stage) -> None:
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error", "times": 5})
    saga = await start_saga(stage.pool)
    async with running(stage.orchestrator()):

        async def it_is_confirmed() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(it_is_confirmed, AMPLE_SECONDS, "end of the saga")


async def test_no_more_sagas_are_driven_at_a_time_than_allowed_and_the_others_follow_at_once(stage: Stage) -> None:
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


async def test_a_saga_that_turned_for_a_reason_of_a_newer_release_is_undone_and_keeps_it(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await stage.orchestrator(checkpoint=dies_at("saga.charge_payment.do.answered")).run_once()
    await stage.pool.execute(
        "UPDATE orders SET cancel_requested_at = clock_timestamp(), cancel_reason = 'of-a-newer-release'"
    )
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: of-a-newer-release"
    assert await stage.standing(saga) == UNDONE

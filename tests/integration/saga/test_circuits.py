"""Calls to a failing partner pause, separately for dos and undos. Its sagas wait, and nothing else changes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import UUID

import pytest

from app.orders.model import Line
from app.saga.gateway import VISITS_PER_SECOND
from app.saga.orchestrator import Orchestrator
from tests.harness.orders import start_saga
from tests.harness.sagas import GatedPayment, Stage, dies_at
from tests.harness.sandboxes import entries, set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

FAILURES, OPEN_SECONDS = 5, 10.0
SHORT_SECONDS = 0.05
DEAD = {"target": "payment.charge", "kind": "error"}
UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}


@dataclass
class Clock:
    """The clock of the circuits."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_orchestrator(stage: Stage, clock: Clock) -> Callable[..., Orchestrator]:
    """Return a function that makes an orchestrator with default circuits and enough concurrency for all sagas."""
    return partial(
        stage.orchestrator,
        concurrency=50,
        circuit_failures=FAILURES,
        circuit_open_seconds=OPEN_SECONDS,
        clock=clock,
    )


async def count_calls(stage: Stage, sagas: list[UUID], operation: str) -> int:
    """Return how often these sagas called the operation."""
    return sum([len(await entries(stage.http, saga, operation)) for saga in sagas])


def state(stage: Stage, partner: str) -> int:
    assert stage.gateway is not None
    return stage.gateway.circuit_state(partner)


async def run_due_sagas(stage: Stage, orchestrator: Orchestrator) -> None:
    """End every pause, and run the orchestrator once."""
    await stage.let_time_pass()
    await orchestrator.run_once()


async def open_circuits(stage: Stage, orchestrator: Orchestrator) -> list[UUID]:
    """Let five sagas fail at payment twice each, which opens the circuits of first calls and of retries.

    All five run at once, so none of them finds the circuit open.
    """
    sagas = [await start_saga(stage.pool) for _ in range(FAILURES)]
    await set_faults(stage.http, DEAD)
    for tried in (1, 2):
        assert state(stage, "payment") == (0 if tried == 1 else 2)
        await run_due_sagas(stage, orchestrator)
        assert await count_calls(stage, sagas, "payment.charge") == tried * FAILURES
    return sagas


async def test_open_circuit_stops_calls(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """The partner's sagas wait without recording an attempt, and are spread out."""
    orchestrator = make_orchestrator()
    sagas = await open_circuits(stage, orchestrator)
    others = [await start_saga(stage.pool) for _ in range(10)]
    for _ in range(3):
        await run_due_sagas(stage, orchestrator)
    assert state(stage, "payment") == 2
    assert await count_calls(stage, [*sagas, *others], "payment.charge") == 2 * FAILURES
    for saga, attempts in [*((saga, 2) for saga in sagas), *((saga, 0) for saga in others)]:
        row = await stage.saga(saga)
        assert (row["step"], row["attempts"], row["lease_owner"]) == ("charge_payment", attempts, None)
        assert await stage.outcome(saga) == "pending"
        assert OPEN_SECONDS < row["pause_seconds"] < 2 * OPEN_SECONDS + 1
    assert len({(await stage.saga(saga))["pause_seconds"] for saga in others}) == len(others)  # spread out
    clock.now += OPEN_SECONDS
    assert state(stage, "payment") == 1
    await set_faults(stage.http)
    await stage.drive(orchestrator)
    assert {await stage.outcome(saga) for saga in [*sagas, *others]} == {"confirmed"}
    assert state(stage, "payment") == 0


async def test_visits_of_waiting_sagas_are_limited(
    stage: Stage, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """Many waiting sagas visit at no more than `VISITS_PER_SECOND`."""
    # The jitter is shorter than the time over which so many sagas are spread out.
    orchestrator = make_orchestrator(circuit_open_seconds=SHORT_SECONDS)
    await open_circuits(stage, orchestrator)
    crowd = [await start_saga(stage.pool) for _ in range(50)]
    await run_due_sagas(stage, orchestrator)
    pauses = sorted([(await stage.saga(saga))["pause_seconds"] for saga in crowd])
    whole = (len(crowd) + FAILURES) / VISITS_PER_SECOND
    assert len(crowd) / VISITS_PER_SECOND < pauses[-1] <= whole + 2 * SHORT_SECONDS


async def test_one_failing_saga_opens_the_circuit(stage: Stage, make_orchestrator: Callable[..., Orchestrator]) -> None:
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, DEAD)
    orchestrator = make_orchestrator()
    for _ in range(2 * FAILURES):
        await run_due_sagas(stage, orchestrator)
    assert state(stage, "payment") == 2
    assert await count_calls(stage, [saga], "payment.charge") == 1 + FAILURES


async def test_orders_that_always_fail_block_no_others(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """Orders that always fail retry all the time, and outnumber the others."""
    await set_faults(stage.http, {**DEAD, "match": {"payment_method": "pm_unlucky"}})
    orchestrator = make_orchestrator()
    bad = [await start_saga(stage.pool, payment_method="pm_unlucky") for _ in range(FAILURES)]
    for _ in range(5):
        await run_due_sagas(stage, orchestrator)
    assert state(stage, "payment") == 2
    clock.now += OPEN_SECONDS
    first = await start_saga(stage.pool)  # the probe
    await run_due_sagas(stage, orchestrator)
    assert await stage.outcome(first) == "confirmed"
    for _ in range(10):
        bad.append(await start_saga(stage.pool, payment_method="pm_unlucky"))
        well = await start_saga(stage.pool)
        await run_due_sagas(stage, orchestrator)
        assert await stage.outcome(well) == "confirmed"
    assert {await stage.outcome(saga) for saga in bad} == {"pending"}
    await set_faults(stage.http)
    clock.now += OPEN_SECONDS
    await stage.drive(orchestrator)
    assert {await stage.outcome(saga) for saga in bad} == {"confirmed"}


async def test_one_probe_and_the_others_follow(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """A half-open circuit admits one saga; the others continue when it succeeds."""
    payment = GatedPayment(stage.partners.payment)
    payment.gate.set()
    orchestrator = make_orchestrator(payment=payment)
    sagas = await open_circuits(stage, orchestrator)
    await set_faults(stage.http)
    payment.gate.clear()
    payment.arrived.clear()
    payment.waiting = 0
    clock.now += OPEN_SECONDS
    await stage.let_time_pass()
    looking = asyncio.create_task(orchestrator.run_once())
    await payment.arrived.wait()

    async def the_others_wait() -> bool:
        return await stage.pool.fetchval("SELECT count(*) = 1 FROM sagas WHERE lease_owner IS NOT NULL") is True

    await wait_until(the_others_wait, AMPLE_SECONDS, "all others given back")
    assert payment.waiting == 1
    payment.gate.set()
    await looking
    assert [await stage.outcome(saga) for saga in sagas].count("confirmed") == 1
    await run_due_sagas(stage, orchestrator)
    assert {await stage.outcome(saga) for saga in sagas} == {"confirmed"}


@pytest.mark.parametrize("point", ["attempted", "answered"])
async def test_crash_of_the_probe_admits_another(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator], point: str
) -> None:
    sagas = [await start_saga(stage.pool) for _ in range(FAILURES)]
    await set_faults(stage.http, {**DEAD, "times": FAILURES})
    deaths = [f"saga.charge_payment.do.{point}"]

    def checkpoint(passed: str) -> None:
        if clock.now > 1000 and deaths:
            dies_at(deaths[0])(passed)

    orchestrator = make_orchestrator(checkpoint=checkpoint)
    await orchestrator.run_once()
    assert state(stage, "payment") == 2
    clock.now += OPEN_SECONDS
    await run_due_sagas(stage, orchestrator)
    deaths.clear()
    await stage.drive(orchestrator)
    assert {await stage.outcome(saga) for saga in sagas} == {"confirmed"}


async def test_cancelled_task_of_the_probe_admits_another(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    sagas = [await start_saga(stage.pool) for _ in range(FAILURES)]
    await set_faults(stage.http, {**DEAD, "times": FAILURES})
    payment = GatedPayment(stage.partners.payment)
    payment.gate.set()
    orchestrator = make_orchestrator(payment=payment)
    await orchestrator.run_once()
    payment.gate.clear()
    payment.arrived.clear()
    clock.now += OPEN_SECONDS
    await stage.let_time_pass()
    looking = asyncio.create_task(orchestrator.run_once())
    await payment.arrived.wait()
    looking.cancel()
    await asyncio.wait([looking])
    payment.gate.set()
    await stage.drive(orchestrator)
    assert {await stage.outcome(saga) for saga in sagas} == {"confirmed"}


async def test_saga_waiting_for_a_circuit_times_out(
    stage: Stage, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """It waits no longer than its deadline, and compensates then."""
    orchestrator = make_orchestrator(circuit_open_seconds=3600)
    sagas = [*await open_circuits(stage, orchestrator), late := await start_saga(stage.pool)]
    await stage.let_the_deadline_pass(in_seconds=600)
    await run_due_sagas(stage, orchestrator)
    for saga in sagas:
        row = await stage.saga(saga)
        assert abs(row["next_attempt_at"] - row["deadline_at"]) < timedelta(seconds=60)
    await stage.let_the_deadline_pass()
    await run_due_sagas(stage, orchestrator)
    assert state(stage, "payment") == 2
    assert {await stage.outcome(saga) for saga in sagas} == {"rejected: timed-out"}
    assert await stage.ledger(late) == ["inventory.hold done", "inventory.release done"]


async def test_undos_have_their_own_circuit(
    stage: Stage, clock: Clock, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    """Failing undos wait and are retried without end, while the same partner's dos continue."""
    turned = [await start_saga(stage.pool, **UNDELIVERABLE) for _ in range(FAILURES)]
    await set_faults(stage.http, {"target": "payment.refund", "kind": "error"})
    orchestrator = make_orchestrator()
    for _ in range(4):
        await run_due_sagas(stage, orchestrator)
    assert state(stage, "payment") == 2
    assert await count_calls(stage, turned, "payment.refund") == 2 * FAILURES
    well = await start_saga(stage.pool)
    await run_due_sagas(stage, orchestrator)
    assert await stage.outcome(well) == "confirmed"
    await stage.let_the_deadline_pass()
    for _ in range(3):
        clock.now += OPEN_SECONDS
        await run_due_sagas(stage, orchestrator)
    assert {await stage.outcome(saga) for saga in turned} == {"compensating: undeliverable"}
    assert await count_calls(stage, turned, "payment.refund") == 2 * FAILURES + 3
    clock.now += OPEN_SECONDS
    await set_faults(stage.http)
    await stage.drive(orchestrator)
    assert {await stage.outcome(saga) for saga in turned} == {"rejected: undeliverable"}


async def test_refusals_do_not_open_a_circuit(stage: Stage, make_orchestrator: Callable[..., Orchestrator]) -> None:
    for _ in range(2 * FAILURES):
        await start_saga(stage.pool, payment_method="pm_card_declined")
    await stage.drive(make_orchestrator())
    assert state(stage, "payment") == 0

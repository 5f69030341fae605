"""While an operator pauses a partner, its sagas wait without an attempt; when the pause ends, they continue."""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from app.errors import DatabaseUnavailable
from app.observability.facts import LoopSucceeded
from app.orders.model import Line
from app.saga import queries
from app.saga.facts import SagaDue
from app.saga.gateway import LOOK_AGAIN_SECONDS, VISITS_PER_SECOND
from app.saga.orchestrator import Orchestrator
from app.saga.pause_watch import RESUMED_SECONDS, PauseWatch
from app.saga.pauses import PartnerPauses
from app.saga.steps import partners
from tests.harness.api import serving
from tests.harness.cancelling import cancel
from tests.harness.operating import pause_partner, resume_partner, retry
from tests.harness.orders import start_saga
from tests.harness.sagas import GatedPayment, Stage, running
from tests.harness.sandboxes import set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}
NO_REFUNDS = {"target": "payment.refund", "kind": "error"}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}


@dataclass
class Process:
    """One process with the role `consumer`: what it knows of the pauses, and its orchestrator."""

    stage: Stage
    owner: str = "one"
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = PartnerPauses()
        self.watch = PauseWatch(self.stage.pool, self.known, self.stage.signals)
        self.orchestrator: Orchestrator = self.stage.orchestrator(self.owner, pauses=self.known, **self.more)

    async def run_once(self) -> int:
        """Read the pauses, then run what is due."""
        await self.watch.run_once()
        return await self.orchestrator.run_once()


async def is_due(stage: Stage, saga: UUID) -> bool:
    return bool((await stage.saga(saga))["due"])


@pytest.mark.parametrize("partner", partners())
async def test_a_paused_partner_gets_no_call(stage: Stage, partner: str) -> None:
    """The saga waits at its first step of the partner, without an attempt, and continues after the resume."""
    await pause_partner(stage.pool, partner)
    saga = await start_saga(stage.pool)
    process = Process(stage)
    for _ in range(3):
        await stage.let_time_pass()
        assert await process.run_once() == 1
    row, ledger = await stage.saga(saga), await stage.ledger(saga)
    assert (row["attempts"], row["lease_owner"], row["needs_operator_at"]) == (0, None, None)
    assert 0 < row["pause_seconds"] <= LOOK_AGAIN_SECONDS + 1
    assert (
        ledger
        == {
            "inventory": [],
            "payment": ["inventory.hold done"],
            "shipping": ["inventory.hold done", "payment.charge done", "inventory.commit done"],
        }[partner]
    )
    await resume_partner(stage.pool, partner)
    assert await process.run_once() == 1
    assert await stage.outcome(saga) == "confirmed"
    attempts = [line.split()[2] for line in await stage.log(saga)]
    assert set(attempts) == {"1"}


@pytest.mark.parametrize("by_hand", [True, False])
async def test_the_end_of_a_pause_makes_its_sagas_due(stage: Stage, by_hand: bool) -> None:
    """At once, by hand and by time. Sagas at other partners keep their waits."""
    await pause_partner(stage.pool, "payment")
    await pause_partner(stage.pool, "shipping")
    process = Process(stage)
    waiting = await start_saga(stage.pool)
    await process.run_once()
    elsewhere = await start_saga(stage.pool)
    await stage.pool.execute(
        "UPDATE sagas SET step = 'create_shipment', next_attempt_at = clock_timestamp() + interval '1 h' WHERE id = $1",
        elsewhere,
    )
    assert not await is_due(stage, waiting)
    heard: list[SagaDue] = []
    stage.signals.subscribe(SagaDue, heard.append)
    await process.watch.run_once()
    assert (await is_due(stage, waiting), heard) == (False, [])
    if by_hand:
        await resume_partner(stage.pool, "payment")
    else:
        await stage.pool.execute("UPDATE partner_pauses SET ends_at = clock_timestamp() WHERE partner = 'payment'")
    await process.watch.run_once()
    assert (await is_due(stage, waiting), len(heard)) == (True, 1)
    assert not await is_due(stage, elsewhere)


async def test_a_runner_that_decided_before_the_resume_is_released(stage: Stage) -> None:
    """Its write comes after the first release; the round after that finds it."""
    await pause_partner(stage.pool, "payment")
    saga = await start_saga(stage.pool)
    slow, quick = Process(stage, "slow"), Process(stage, "quick")
    await slow.watch.run_once()
    await quick.watch.run_once()
    await resume_partner(stage.pool, "payment")
    await quick.watch.run_once()
    await slow.orchestrator.run_once()
    assert not await is_due(stage, saga)
    await quick.watch.run_once()
    assert await is_due(stage, saga)
    await quick.watch.run_once()
    await quick.orchestrator.run_once()
    assert await stage.outcome(saga) == "confirmed"


async def test_a_process_releases_what_was_resumed_before_it_started(stage: Stage) -> None:
    """No process ran when the operator resumed: without it, the sagas would wait for the end that was planned."""
    await pause_partner(stage.pool, "payment")
    await pause_partner(stage.pool, "shipping")
    saga = await start_saga(stage.pool)
    await Process(stage, "killed").run_once()
    await resume_partner(stage.pool, "payment")
    elsewhere = await start_saga(stage.pool)
    await stage.pool.execute(
        "UPDATE sagas SET step = 'create_shipment', next_attempt_at = clock_timestamp() + interval '1 h' WHERE id = $1",
        elsewhere,
    )
    await Process(stage).watch.run_once()
    assert (await is_due(stage, saga), await is_due(stage, elsewhere)) == (True, False)


async def test_a_process_that_starts_long_after_a_resume_releases_nothing(stage: Stage) -> None:
    """Each saga that waited for the pause has looked again by then; what waits now waits for a retry."""
    await pause_partner(stage.pool, "payment", 86_400)
    saga = await start_saga(stage.pool)
    await Process(stage).run_once()
    await resume_partner(stage.pool, "payment")
    await stage.pool.execute(
        "UPDATE partner_pauses SET ended_at = ended_at - make_interval(secs => $1)", RESUMED_SECONDS
    )
    await Process(stage).watch.run_once()
    assert not await is_due(stage, saga)


async def test_every_waiting_saga_is_released(stage: Stage) -> None:
    """Also if there are more than one statement takes. A running saga keeps its lease."""
    await pause_partner(stage.pool, "inventory")
    sagas = [await start_saga(stage.pool) for _ in range(5)]
    process = Process(stage)
    process.watch = PauseWatch(stage.pool, process.known, stage.signals, batch_rows=2)
    await process.run_once()
    await stage.pool.execute("UPDATE sagas SET lease_owner = 'another' WHERE id = $1", sagas[0])
    before = await stage.saga(sagas[0])
    await resume_partner(stage.pool, "inventory")
    assert [await process.watch.run_once() for _ in range(3)] == [2, 2, 0]
    assert [await is_due(stage, saga) for saga in sagas] == [False, True, True, True, True]
    assert (await stage.saga(sagas[0]))["next_attempt_at"] == before["next_attempt_at"]


async def test_a_pause_during_a_release_is_obeyed(stage: Stage) -> None:
    """Also one of the partner whose sagas are being released: those that still wait go on waiting."""
    await pause_partner(stage.pool, "inventory")
    sagas = [await start_saga(stage.pool) for _ in range(5)]
    process = Process(stage)
    process.watch = PauseWatch(stage.pool, process.known, stage.signals, batch_rows=2)
    await process.run_once()
    await resume_partner(stage.pool, "inventory")
    assert await process.watch.run_once() == 2
    await pause_partner(stage.pool, "inventory")
    await pause_partner(stage.pool, "shipping")
    assert await process.watch.run_once() == 0
    assert (process.known.is_paused("inventory"), process.known.is_paused("shipping")) == (True, True)
    assert [await is_due(stage, saga) for saga in sagas].count(True) == 2


async def test_a_release_skips_locked_sagas(stage: Stage) -> None:
    """So it waits for no other transaction, and cannot deadlock with one."""
    await pause_partner(stage.pool, "inventory")
    locked, other = await start_saga(stage.pool), await start_saga(stage.pool)
    process = Process(stage)
    await process.run_once()
    await resume_partner(stage.pool, "inventory")
    async with stage.pool.acquire() as conn, conn.transaction():
        await conn.execute("SELECT FROM sagas WHERE id = $1 FOR UPDATE", locked)
        await process.watch.run_once()
        assert await is_due(stage, other)
    assert not await is_due(stage, locked)
    await process.watch.run_once()
    assert await is_due(stage, locked)


async def test_an_undo_waits_too_and_needs_no_operator(stage: Stage) -> None:
    """A pause of any length changes nothing for it. After the pause, the undo has the usual time."""
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await set_faults(stage.http, NO_REFUNDS)
    process = Process(stage, more={"needs_operator_seconds": 300.0})
    await process.run_once()
    assert (await stage.saga(saga))["needs_operator_at"] is not None  # in five minutes, because of a failure
    await pause_partner(stage.pool, "payment")
    refunds = len(await stage.ledger(saga))
    for _ in range(3):
        await stage.let_time_pass()
        await process.run_once()
        row = await stage.saga(saga)
        assert (row["step"], row["needs_operator_at"], row["attempts"]) == ("charge_payment", None, 1)
    assert len(await stage.ledger(saga)) == refunds
    await resume_partner(stage.pool, "payment")
    await process.run_once()
    row = await stage.saga(saga)
    assert (row["needs_operator_at"] - row["updated_at"]).total_seconds() == 300
    await set_faults(stage.http)
    await stage.drive(process.orchestrator)
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("rejected: undeliverable", UNDONE)


async def test_a_flag_from_before_the_pause_stays(stage: Stage) -> None:
    """An operator had to look at the saga already, and still has to."""
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await set_faults(stage.http, NO_REFUNDS)
    process = Process(stage)
    await process.run_once()
    await stage.pool.execute("UPDATE sagas SET needs_operator_at = updated_at")
    await pause_partner(stage.pool, "payment")
    await stage.let_time_pass()
    await process.run_once()
    async with stage.pool.acquire() as conn:
        assert (await queries.measure(conn)).needs_operator == 1
    assert (await stage.saga(saga))["attempts"] == 1


async def test_a_deadline_runs_on(stage: Stage) -> None:
    """A forward saga looks again at its deadline at the latest, and then compensates; its undo waits for the pause."""
    saga = await start_saga(stage.pool)
    process = Process(stage)
    await pause_partner(stage.pool, "payment")
    await stage.let_the_deadline_pass(in_seconds=30)
    await process.run_once()
    assert (await stage.saga(saga))["pause_seconds"] <= 30
    await pause_partner(stage.pool, "inventory")
    await stage.let_the_deadline_pass()
    await stage.let_time_pass()
    await process.run_once()
    assert await stage.outcome(saga) == "compensating: timed-out"
    assert await stage.ledger(saga) == ["inventory.hold done"]
    await resume_partner(stage.pool, "inventory")
    await process.run_once()
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("rejected: timed-out", UNDONE)
    assert await stage.ledger(saga) == ["inventory.hold done", "inventory.release done"]


async def test_a_cancel_and_a_retry_do_not_pass_a_pause(stage: Stage) -> None:
    """The saga looks at once, and waits again."""
    saga = await start_saga(stage.pool)
    process = Process(stage)
    await pause_partner(stage.pool, "payment")
    await process.run_once()
    await retry(stage.pool, saga)
    await process.run_once()
    assert await stage.ledger(saga) == ["inventory.hold done"]
    await pause_partner(stage.pool, "inventory")
    await cancel(stage.pool, saga)
    await process.run_once()
    assert await stage.outcome(saga) == "compensating: cancelled-by-customer"
    assert await stage.ledger(saga) == ["inventory.hold done"]


async def test_a_call_that_has_started_is_not_interrupted(stage: Stage) -> None:
    """Its outcome is recorded, and the next call of the partner waits."""
    saga = await start_saga(stage.pool)
    payment = GatedPayment(stage.partners.payment)
    process = Process(stage, more={"payment": payment})
    task = asyncio.create_task(process.run_once())
    await payment.arrived.wait()
    for partner in partners():
        await pause_partner(stage.pool, partner)
    await process.watch.run_once()
    payment.gate.set()
    await task
    assert await stage.ledger(saga) == ["inventory.hold done", "payment.charge done"]
    row = await stage.saga(saga)
    assert (row["step"], row["attempts"], row["lease_owner"]) == ("commit_inventory", 0, None)


async def test_visits_during_a_pause_are_limited(stage: Stage) -> None:
    """Many sagas look again at no more than `VISITS_PER_SECOND`, and none later than the end of the pause."""
    await pause_partner(stage.pool, "inventory")
    crowd = [await start_saga(stage.pool) for _ in range(20)]
    process = Process(stage, more={"concurrency": 50})
    await process.run_once()
    waits = sorted([(await stage.saga(saga))["pause_seconds"] for saga in crowd])
    assert waits[-1] - waits[0] >= len(crowd) / 2 / VISITS_PER_SECOND  # each is counted from a later moment
    await pause_partner(stage.pool, "inventory", 30)
    await stage.let_time_pass()
    await process.run_once()
    assert max([(await stage.saga(saga))["pause_seconds"] for saga in crowd]) <= 30


async def test_an_open_circuit_has_its_own_line(stage: Stage) -> None:
    """Waits for a pause, which are long, do not delay sagas that wait for a circuit."""
    await pause_partner(stage.pool, "inventory")
    behind = [await start_saga(stage.pool) for _ in range(3)]
    process = Process(stage, more={"circuit_failures": 1, "circuit_open_seconds": 5.0})
    await process.run_once()
    await resume_partner(stage.pool, "inventory")
    await pause_partner(stage.pool, "shipping")
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error"})
    await stage.let_time_pass()
    await process.run_once()
    rows = [await stage.saga(saga) for saga in behind]
    assert {row["step"] for row in rows} == {"charge_payment"}
    assert max(row["pause_seconds"] for row in rows) < 11


async def test_no_saga_starts_before_the_pauses_are_known(stage: Stage) -> None:
    """A process that starts during a pause makes no call. The first reading wakes it."""
    saga = await start_saga(stage.pool)
    process = Process(stage)
    stage.signals.wake(process.orchestrator.wake, SagaDue)
    rounds: list[LoopSucceeded] = []

    def has_turned(number: int) -> bool:
        return len(rounds) >= number

    stage.signals.subscribe(LoopSucceeded, rounds.append)
    async with running(process.orchestrator):
        for number in (1, 2):
            process.orchestrator.wake()
            await wait_until(partial(has_turned, number), AMPLE_SECONDS, "a round of the orchestrator")
        assert (await stage.saga(saga))["version"] == 1
        await process.watch.run_once()

        async def has_ended() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(has_ended, AMPLE_SECONDS, "the end of the order")


async def test_a_pause_stays_known_while_postgres_is_down(stage: Stage) -> None:
    """Until its end, which the process knows."""
    now = 1000.0
    known = PartnerPauses(clock=lambda: now)
    await pause_partner(stage.pool, "payment", 60)
    await PauseWatch(stage.pool, known, stage.signals).run_once()
    unreachable = PauseWatch(stage.pool, known, stage.signals)
    await stage.pool.close()
    with pytest.raises(DatabaseUnavailable):
        await unreachable.run_once()
    assert known.is_paused("payment")
    now += 61
    assert not known.is_paused("payment")


async def test_a_whole_process_obeys_and_reports(database_url: str, stage: Stage, sandbox_url: str) -> None:
    """Within a poll it stops calling, `partner_paused` shows it, and a resume by another process ends it."""
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with serving(database_url, roles="relay,consumer", **urls) as process:

        async def shows(partner: str, value: int) -> bool:
            return f'partner_paused{{partner="{partner}"}} {value}.0' in (await process.get("/metrics")).text

        for partner in partners():
            assert await shows(partner, 0)
        await pause_partner(stage.pool, "payment")
        await wait_until(lambda: shows("payment", 1), AMPLE_SECONDS, "the pause in the metrics")
        assert await shows("shipping", 0)
        saga = await start_saga(stage.pool)

        async def waits() -> bool:
            row = await stage.saga(saga)
            return bool((row["step"], row["lease_owner"], row["due"]) == ("charge_payment", None, False))

        await wait_until(waits, AMPLE_SECONDS, "the wait for the pause")
        await resume_partner(stage.pool, "payment")

        async def has_ended() -> bool:
            return await stage.outcome(saga) == "confirmed"

        await wait_until(has_ended, AMPLE_SECONDS, "the end of the order")
        await wait_until(lambda: shows("payment", 0), AMPLE_SECONDS, "the resume in the metrics")

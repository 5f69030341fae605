"""A plan with one row more runs forward and backward: nothing else changes for a new step."""

from dataclasses import replace
from uuid import UUID

import httpx
import pytest

from app.db import Pool
from app.orders.model import Line
from app.partners.ports import NotSent, Outcome, PartnerPorts, Refused, Unknown
from app.saga.orchestrator import Orchestrator
from app.saga.steps import NEWEST, Action, Plans, StepRequest
from tests.harness.fifth_step import AWARD_POINTS, NO_ACCOUNT, VERSION, Loyalty, plans_with
from tests.harness.observed import Observed
from tests.harness.orders import start_saga, start_saga_of
from tests.harness.sagas import NEVER, Stage, dies_at
from tests.harness.sandboxes import Partners
from tests.harness.steps import crash_points

DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}

PLAN = plans_with(Loyalty())[VERSION]
FORWARD, BACKWARD = crash_points(Action.DO, PLAN), crash_points(Action.UNDO, PLAN)
DOS = [f"do {spec.step} 1 done" for spec in PLAN]
UNDOS = [f"undo {spec.step} 1 done" for spec in reversed(PLAN) if spec.undo is not None]


@pytest.fixture
def loyalty() -> Loyalty:
    return Loyalty()


@pytest.fixture
def plans(loyalty: Loyalty) -> Plans:
    return plans_with(loyalty)


@pytest.fixture
async def stage(pool: Pool, http: httpx.AsyncClient, partners: Partners, plans: Plans) -> Stage:
    """A stage whose metrics know the new step."""
    return Stage(pool, http, partners, Observed(plans=plans))


def runs(stage: Stage, plans: Plans, owner: str = "one", *, failures: int = NEVER) -> Orchestrator:
    return stage.orchestrator(owner, plans=plans, circuit_failures=failures)


async def answers(stage: Stage, saga: UUID) -> list[str]:
    """Return the log without the attempts."""
    return [line for line in await stage.log(saga) if not line.endswith("attempted")]


async def test_a_fifth_step_runs_forward(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """All five steps run in the order of the rows, and the order is confirmed."""
    saga = await start_saga_of(stage.pool, plans, {})
    assert await runs(stage, plans).run_once() == 1
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("confirmed", DONE)
    assert (await stage.order(saga)).tracking_id
    assert await answers(stage, saga) == DOS
    assert (loyalty.calls, loyalty.awarded) == (["award"], {saga})
    assert (await stage.saga(saga))["plan_version"] == VERSION


async def test_a_fifth_step_runs_backward(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """Its undo runs in its place in the reverse order, with the recorded reply of its do."""
    saga = await start_saga_of(stage.pool, plans, UNDELIVERABLE)
    assert await runs(stage, plans).run_once() == 1
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("rejected: undeliverable", UNDONE)
    assert await answers(stage, saga) == [*DOS[:-1], "do create_shipment 1 refused", *UNDOS]
    assert (loyalty.calls, loyalty.awarded) == (["award", f"revoke award_{saga}"], set())


async def test_a_refusal_of_a_fifth_step_compensates(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """A code of its row makes the saga undo everything; the order shows the code."""
    loyalty.script = [Refused(NO_ACCOUNT)]
    saga = await start_saga_of(stage.pool, plans, {})
    await stage.drive(runs(stage, plans))
    assert (await stage.outcome(saga), await stage.standing(saga)) == ("rejected: no-account", UNDONE)
    assert await answers(stage, saga) == [*DOS[:3], f"do {AWARD_POINTS} 1 refused", *UNDOS[1:]]
    assert loyalty.calls == ["award", "revoke None"]


async def test_unclear_answers_of_a_fifth_step_are_retried(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """A code that is not in its row, no connection and no answer are all retried."""
    loyalty.script = [Refused("out-of-stock"), NotSent("no connection"), Unknown("no answer")]
    saga = await start_saga_of(stage.pool, plans, {})
    await stage.drive(runs(stage, plans))
    assert await stage.outcome(saga) == "confirmed"
    assert (loyalty.calls, loyalty.awarded) == (["award"] * 4, {saga})


@pytest.mark.parametrize("point", [*FORWARD, *BACKWARD])
async def test_a_crash_at_any_point_of_five_steps(stage: Stage, plans: Plans, loyalty: Loyalty, point: str) -> None:
    """Wherever the process dies, another one finishes the saga: forward, or with everything undone."""
    backward = point in BACKWARD
    saga = await start_saga_of(stage.pool, plans, UNDELIVERABLE if backward else {})
    await stage.orchestrator("first", plans=plans, checkpoint=dies_at(point)).run_once()
    assert (await stage.saga(saga))["finished_at"] is None
    await stage.drive(runs(stage, plans, "second"))
    assert await stage.outcome(saga) == ("rejected: undeliverable" if backward else "confirmed")
    assert await stage.standing(saga) == (UNDONE if backward else DONE)
    assert loyalty.awarded == (set() if backward else {saga})


async def test_a_fifth_step_has_metrics_and_a_circuit(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """Its series exist before its first call, and its partner is paused after failures like any other."""
    value = stage.signals.value
    for action in Action:
        labels = {"step": AWARD_POINTS, "action": action, "outcome": "done"}
        assert value("saga_step_duration_seconds_count", labels) == 0
    assert value("saga_compensation_failed_total", {"step": AWARD_POINTS}) == 0
    loyalty.script = [Unknown("503")] * 2
    orchestrator = runs(stage, plans, failures=2)
    assert stage.gateway is not None
    for _ in range(2):
        await start_saga_of(stage.pool, plans, {})
    await orchestrator.run_once()
    assert stage.gateway.circuit_state("loyalty") == 2
    assert stage.gateway.circuit_state("shipping") == 0
    assert value("saga_step_duration_seconds_count", {**labels, "action": "do", "outcome": "unknown"}) == 2


async def test_old_sagas_keep_their_plan(stage: Stage, plans: Plans, loyalty: Loyalty) -> None:
    """A process that knows both plans finishes each saga with the plan that it started with."""
    old, new = await start_saga(stage.pool), await start_saga_of(stage.pool, plans, {})
    await stage.drive(runs(stage, plans))
    assert [(await stage.saga(saga))["plan_version"] for saga in (old, new)] == [NEWEST, VERSION]
    assert [await stage.outcome(saga) for saga in (old, new)] == ["confirmed", "confirmed"]
    assert loyalty.awarded == {new}


async def test_an_older_release_leaves_new_sagas_alone(stage: Stage, plans: Plans) -> None:
    """A process that does not know the plan of a saga never claims it."""
    saga = await start_saga_of(stage.pool, plans, {})
    assert await stage.orchestrator().run_once() == 0
    await stage.drive(runs(stage, plans))
    assert await stage.outcome(saga) == "confirmed"


async def test_only_undos_that_read_a_reply_get_it(stage: Stage, plans: Plans) -> None:
    """The undo of another step never gets the recorded reply of the step before it."""
    replies: list[object] = []
    first, *others = plans[VERSION]

    async def release(ports: PartnerPorts, request: StepRequest) -> Outcome:
        replies.append(request.do_reply)
        return await ports.inventory.release(request.order.id)

    changed = {**plans, VERSION: (replace(first, undo=release), *others)}
    saga = await start_saga_of(stage.pool, changed, UNDELIVERABLE)
    await runs(stage, changed).run_once()
    assert (await stage.outcome(saga), replies) == ("rejected: undeliverable", [None])

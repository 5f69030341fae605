"""A permanent error, or an undo that keeps failing, is flagged in the row and logged, as long as it lasts."""

from collections.abc import Iterable, MutableMapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from app.orders.model import Line
from app.partners.ports import Unknown
from app.saga import queries
from tests.harness.orders import start_saga
from tests.harness.sagas import ScriptedPayment, Stage
from tests.harness.sandboxes import set_faults

UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}
NO_REFUNDS = {"target": "payment.refund", "kind": "error"}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}


async def needing(stage: Stage) -> int:
    async with stage.pool.acquire() as conn:
        return (await queries.measure(conn)).needs_operator


def alarms(logs: Iterable[MutableMapping[str, Any]]) -> list[str]:
    return [each["event"] for each in logs if each["log_level"] == "error"]


async def look(stage: Stage, saga: UUID, **more: Any) -> list[str]:
    """End every pause, run an orchestrator once, and return the errors that it logged."""
    await stage.let_time_pass()
    with capture_logs() as logs:
        await stage.orchestrator(**more).run_once()
    assert (await stage.saga(saga))["lease_owner"] is None
    return alarms(logs)


async def let_five_minutes_pass(stage: Stage) -> None:
    await stage.pool.execute(
        """
        UPDATE sagas SET updated_at = updated_at - interval '300 seconds',
                         needs_operator_at = needs_operator_at - interval '300 seconds'
        """
    )


async def test_failing_refunds_need_an_operator(
    stage: Stage,
) -> None:
    """The order ends without an operator's action when the refunds succeed."""
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await set_faults(stage.http, NO_REFUNDS)
    due_at: set[datetime] = set()
    for _ in range(3):
        assert await look(stage, saga) == []
        assert (await needing(stage), await stage.outcome(saga)) == (0, "compensating: undeliverable")
        row = await stage.saga(saga)
        assert due_at or row["needs_operator_at"] - row["updated_at"] == timedelta(seconds=300)
        due_at.add(row["needs_operator_at"])
    assert len(due_at) == 1  # counted from the first failure; later ones do not move the time
    await let_five_minutes_pass(stage)
    assert await look(stage, saga) == ["saga.needs_operator"]
    for _ in range(3):
        assert await look(stage, saga) == []  # it was logged before
        assert (await needing(stage), await stage.outcome(saga)) == (1, "compensating: undeliverable")
    assert (await stage.saga(saga))["attempts"] == 7
    await set_faults(stage.http, {"target": "inventory.release", "kind": "error"})
    assert await look(stage, saga) == []
    assert await needing(stage) == 0  # the refund succeeded; the next call has its own time
    await set_faults(stage.http)
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert await stage.standing(saga) == UNDONE
    assert (await stage.saga(saga))["needs_operator_at"] is None


async def test_undo_waiting_for_a_circuit_needs_an_operator(stage: Stage) -> None:
    sagas = [await start_saga(stage.pool, **UNDELIVERABLE) for _ in range(4)]
    await set_faults(stage.http, NO_REFUNDS)
    orchestrator = stage.orchestrator(concurrency=1, circuit_failures=2, circuit_open_seconds=3600)
    for _ in sagas:
        await orchestrator.run_once()
    assert sorted([(await stage.saga(saga))["attempts"] for saga in sagas]) == [0, 0, 1, 1]
    await let_five_minutes_pass(stage)
    assert await needing(stage) == len(sagas)


async def test_late_forward_saga_needs_no_operator(stage: Stage) -> None:
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error"})
    assert await look(stage, saga, needs_operator_seconds=0.0) == []
    assert (await needing(stage), (await stage.saga(saga))["needs_operator_at"]) == (0, None)


@pytest.mark.parametrize("lines", [(Line("WIDGET", 3, 999),), UNDELIVERABLE["lines"]], ids=["forward", "backward"])
async def test_permanent_error_needs_an_operator_at_once(stage: Stage, lines: tuple[Line, ...]) -> None:
    """The failing call is a charge, or the refund of an order that cannot be shipped. Retries continue."""
    saga = await start_saga(stage.pool, lines=lines)
    forward = lines[0].sku == "WIDGET"
    if not forward:
        await set_faults(stage.http, {"target": "payment.refund", "kind": "unavailable", "times": 1})
        await look(stage, saga)
    answers = [Unknown("401 no-such-key", our_fault=True), Unknown("500 partner-error")]
    payment = ScriptedPayment(stage.partners.payment, *answers)
    assert await look(stage, saga, payment=payment) == ["saga.step", "saga.needs_operator"]
    assert await needing(stage) == 1
    assert await look(stage, saga, payment=payment) == []
    assert await needing(stage) == 1  # a later, different failure does not clear it
    await look(stage, saga, payment=payment)
    assert await needing(stage) == 0
    assert await stage.outcome(saga) == ("confirmed" if forward else "rejected: undeliverable")


async def test_defect_in_a_client_needs_an_operator(stage: Stage) -> None:
    """Retries continue."""
    saga = await start_saga(stage.pool)
    payment = ScriptedPayment(stage.partners.payment, KeyError("a secret"))
    assert await look(stage, saga, payment=payment) == ["partner.defect", "saga.step", "saga.needs_operator"]
    assert await needing(stage) == 1
    assert (await stage.saga(saga))["lease_owner"] is None
    assert "unknown defect: KeyError" in await stage.pool.fetchval(
        "SELECT string_agg(outcome || ' ' || detail, ', ') FROM saga_steps WHERE detail IS NOT NULL"
    )
    await look(stage, saga, payment=payment)
    assert (await needing(stage), await stage.outcome(saga)) == (0, "confirmed")


@pytest.mark.parametrize("target", ["payment.charge", "inventory.release"])
async def test_garbage_needs_an_operator(stage: Stage, target: str) -> None:
    """Retries continue."""
    saga = await start_saga(stage.pool, **UNDELIVERABLE)
    await set_faults(stage.http, {"target": target, "kind": "garbage", "times": 1})
    assert await look(stage, saga) == ["saga.step", "saga.needs_operator"]
    assert await needing(stage) == 1
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: undeliverable"
    assert (await needing(stage), await stage.standing(saga)) == (0, UNDONE)


async def test_compensating_clears_needs_operator(stage: Stage) -> None:
    """A saga that compensates after a permanent error of its do no longer needs an operator."""
    saga = await start_saga(stage.pool)
    payment = ScriptedPayment(stage.partners.payment, Unknown("403 forbidden", our_fault=True))
    await look(stage, saga, payment=payment)
    assert await needing(stage) == 1
    await stage.let_the_deadline_pass()
    await look(stage, saga)
    assert (await needing(stage), await stage.outcome(saga)) == (0, "rejected: timed-out")

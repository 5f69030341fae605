"""An operator makes orders compensate at any time: it is too late and they are confirmed, or everything is undone."""

import asyncio
import random
import signal

import httpx
import pytest

from tests.e2e.conftest import System, client, order
from tests.harness.commands import orders
from tests.harness.processes import Service
from tests.harness.steps import DO, PLAN
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDERS = 40
LOG_LINES = 2 * len(PLAN)  # of a confirmed order's saga: each step attempted, and done
TOKEN = "a-token-of-the-operators"
WHY = "the warehouse burns"
COMPENSATED = ("rejected", "compensated-by-operator")
UNSTARTED = ("cancelled", "compensated-by-operator")


async def place_and_compensate(system: System, services: list[Service], number: int, lines: int) -> tuple[str, str]:
    """Place an order and compensate it when its log has so many rows. Return its id and the command's answer."""
    here, there = services if number % 2 else reversed(services)
    order_id = str((await system.place([here], f"order-{number}", order())).json()["id"])
    await wait_until(lambda: system.has_come(order_id, lines), 60, f"line {lines} of the log of {order_id}")
    async with client(there.url) as ops:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = await ops.post(f"/ops/sagas/{order_id}/compensate", json={"reason": WHY}, headers=headers)
    system.answers.add_cancel(order_id, answer)
    return order_id, str(answer.json().get("outcome", answer.json().get("code")))


async def test_compensated_orders_are_never_confirmed(system: System) -> None:
    """Operators compensate at random instants; an order whose command succeeded is never confirmed."""
    await system.faults(*({"target": each, "kind": "slow", "delay_seconds": 0.1} for each in DO))
    services = [await system.start(admin_token=TOKEN), await system.start(admin_token=TOKEN)]
    dice = random.Random(21)  # noqa: S311 - the mix of instants, not a secret
    instants = [dice.randint(0, LOG_LINES) for _ in range(ORDERS)]
    told = dict(
        await asyncio.gather(
            *(place_and_compensate(system, services, number, lines) for number, lines in enumerate(instants))
        )
    )
    await system.all_ended()
    assert await system.violations() == []
    expected = {
        "turns-back": COMPENSATED,
        "cancelled": UNSTARTED,
        "order-not-cancellable": ("confirmed", None),
    }
    rows = await system.pool.fetch("SELECT id, status, status_reason FROM orders")
    ended = {str(row["id"]): (row["status"], row["status_reason"]) for row in rows}
    assert ended == {order_id: expected[outcome] for order_id, outcome in told.items()}
    assert {"turns-back", "order-not-cancellable"} <= set(told.values())
    recorded = await system.pool.fetch("SELECT order_id, outcome FROM operator_actions")
    assert {str(row["order_id"]): row["outcome"] for row in recorded} == {
        order_id: "refused" if outcome == "order-not-cancellable" else outcome for order_id, outcome in told.items()
    }
    assert len(recorded) == ORDERS


@pytest.mark.parametrize("instant", ["attempted", "answered"])
async def test_compensation_survives_a_crash(system: System, instant: str) -> None:
    """The command runs while the charge gets no answer; the service dies at the refund, and another one takes over."""
    await system.faults({"target": "payment.charge", "kind": "unavailable"})
    doomed = await system.start_crashing(f"saga.charge_payment.undo.{instant}")
    order_id = str((await system.place([doomed], "order", order())).json()["id"])
    await wait_until(lambda: system.has_come(order_id, 3), AMPLE_SECONDS, "a charge")
    url = system.env["ORDERS_DATABASE_URL"]
    code, out, _ = await orders("saga", "compensate", order_id, "--reason", WHY, database_url=url)
    assert (code, out) == (0, f"{order_id} turns back\n")
    assert await wait_until(doomed.process.poll, AMPLE_SECONDS, "death of the service") == -signal.SIGKILL
    system.answers.add_cancel(order_id, httpx.Response(httpx.codes.ACCEPTED))
    await system.start()
    await system.all_ended()
    assert await system.statuses() == {COMPENSATED}
    assert await system.violations() == []
    code, out, _ = await orders("saga", "compensate", order_id, "--reason", WHY, database_url=url)
    assert (code, out) == (0, f"{order_id} has ended already, with everything undone: nothing was changed\n")

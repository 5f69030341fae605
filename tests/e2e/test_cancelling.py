"""Customers cancel orders at any time: the cancel is too late and the order is confirmed, or it is cancelled."""

import asyncio
import random
import signal

import httpx
import pytest

from tests.e2e.conftest import System, order
from tests.harness.processes import Service
from tests.harness.steps import DO, PLAN
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDERS = 60
LOG_LINES = 2 * len(PLAN)  # of a confirmed order's saga: each step attempted, and done
CANCELLED = ("cancelled", "cancelled-by-customer")
TOO_LATE = httpx.codes.CONFLICT


def id_of(placed: httpx.Response) -> str:
    return str(placed.json()["id"])


async def place_and_cancel(system: System, services: list[Service], number: int, lines: int) -> int:
    """Place an order and cancel it when its log has so many rows. Return the answer to the cancel."""
    here, there = services if number % 2 else reversed(services)
    order_id = id_of(await system.place([here], f"order-{number}", order("WIDGET" if number else "RARE")))
    await wait_until(lambda: system.has_come(order_id, lines), 60, f"line {lines} of the log of {order_id}")
    return (await system.cancel([there], f"cancel-{number}", order_id)).status_code


async def test_cancelled_orders_are_never_confirmed(system: System) -> None:
    """Customers cancel at random times; at least one order has no shipment yet, and at least one has ended."""
    never = {"target": "shipping.create", "kind": "unavailable", "match": {"items": [{"item_id": "RARE", "qty": 3}]}}
    slow = ({"target": each, "kind": "slow", "delay_seconds": 0.1} for each in DO)
    await system.faults(never, *slow)
    services = [await system.start(), await system.start()]
    dice = random.Random(20)  # noqa: S311 - the mix of instants, not a secret
    instants = [LOG_LINES - 1, LOG_LINES, *(dice.randint(0, LOG_LINES) for _ in range(ORDERS - 2))]
    answers = await asyncio.gather(
        *(place_and_cancel(system, services, number, lines) for number, lines in enumerate(instants))
    )
    assert (answers[0], answers[1]) == (httpx.codes.ACCEPTED, TOO_LATE)
    await system.all_ended()
    assert await system.violations() == []
    statuses = await system.pool.fetch("SELECT status FROM orders")
    told = [row["status"] for row in statuses]
    assert (told.count("confirmed"), told.count("cancelled")) == (
        answers.count(TOO_LATE),
        ORDERS - answers.count(TOO_LATE),
    )


async def test_cancel_before_the_message_is_published(system: System) -> None:
    """The saga of the order never starts."""
    api = await system.start(roles="api")
    order_id = id_of(await system.place([api], "order", order()))
    assert (await system.cancel([api], "cancel", order_id)).status_code == httpx.codes.OK
    await system.start()
    await system.all_ended()
    await wait_until(lambda: is_handled(system), AMPLE_SECONDS, "the message's effect")
    assert await system.statuses() == {CANCELLED}
    assert await system.violations() == []
    assert await system.pool.fetchval("SELECT count(*) FROM sagas") == 0


async def is_handled(system: System) -> bool:
    return bool(await system.pool.fetchval("SELECT count(*) = 1 FROM inbox WHERE processed_at IS NOT NULL"))


@pytest.mark.parametrize(
    "point",
    ["cancel.committed", *(f"saga.charge_payment.undo.{instant}" for instant in ("attempted", "answered"))],
)
async def test_cancel_survives_a_crash(system: System, point: str) -> None:
    """The partner answers no charge, so the cancel is early enough, and the saga is waiting or running."""
    await system.faults({"target": "payment.charge", "kind": "unavailable"})
    doomed = await system.start_crashing(point)
    services = [doomed]
    order_id = id_of(await system.place(services, "order", order()))
    await wait_until(lambda: system.has_come(order_id, 3), AMPLE_SECONDS, "a charge")
    cancelling = asyncio.create_task(system.cancel(services, "cancel", order_id))
    assert await wait_until(doomed.process.poll, AMPLE_SECONDS, f"death at {point}") == -signal.SIGKILL
    services.append(await system.start())
    assert (await cancelling).status_code == httpx.codes.ACCEPTED
    await system.all_ended()
    assert await system.statuses() == {CANCELLED}
    assert await system.violations() == []

"""A SIGKILL at any crash point only costs time: after a restart every order ends, and the ledger agrees."""

import asyncio
import signal

import pytest

from tests.e2e.conftest import System, order
from tests.harness import steps
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDERS = 3

FORWARD = [
    "intake.committed",
    "relay.claimed",
    "relay.published",
    "consumer.committed",
    *steps.FORWARD,
    "saga.finished",
]
BACKWARD = [*steps.BACKWARD, "saga.finished"]


async def crash_at(system: System, point: str, sku: str) -> None:
    """Kill a service at the crash point while orders are placed, and let another one take over."""
    doomed = await system.start_crashing(point)
    services = [doomed]
    placing = [asyncio.create_task(system.place(services, f"key-{n}", order(sku))) for n in range(ORDERS)]
    assert await wait_until(doomed.process.poll, AMPLE_SECONDS, f"death at {point}") == -signal.SIGKILL
    services.append(await system.start())
    await asyncio.gather(*placing)
    await system.all_ended()


@pytest.mark.parametrize("point", FORWARD)
async def test_crash_forward_confirms_once(system: System, point: str) -> None:
    """A SIGKILL at any crash point forward: every order is confirmed once after a restart."""
    await crash_at(system, point, "WIDGET")
    assert await system.violations() == []
    assert await system.statuses() == {("confirmed", None)}


@pytest.mark.parametrize("point", BACKWARD)
async def test_crash_backward_undoes_once(system: System, point: str) -> None:
    """A SIGKILL at any crash point backward: everything is undone once after a restart."""
    await crash_at(system, point, "UNDELIVERABLE")
    assert await system.violations() == []
    assert await system.statuses() == {("rejected", "undeliverable")}

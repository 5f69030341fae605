"""Faults of the service's own processes."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from chaos.proxy.faults import Delay
from chaos.runner.faults.acts import Inject, Row, alone, freeze, kill
from chaos.runner.system import System
from tests.harness.processes import Service

SLOW_SECONDS = 0.3
AWAKE_SECONDS = 0.7  # between two freezes: enough to take leases


def _of_role(role: str, act: Callable[[Service, float], Awaitable[None]]) -> Inject:
    """Hit one process of a role, or now and then all of them."""

    async def hit(system: System, rng: random.Random, seconds: float) -> None:
        services = system.roles[role]
        victims = services if rng.random() < 0.3 else [rng.choice(services)]  # noqa: PLR2004 - now and then
        await asyncio.gather(*(alone(system, service, act, seconds) for service in victims))

    return hit


async def restart(service: Service, seconds: float) -> None:
    """Stop a process as a deployment does, and start it again after a while."""
    await service.terminate()
    await asyncio.sleep(seconds)
    await service.start()


async def _freeze_mid_publish(system: System, rng: random.Random, seconds: float) -> None:
    """Freeze a relay for longer than its lease while a slow link keeps its events on their way; another takes over."""
    slow = Delay(seconds=SLOW_SECONDS)
    system.rabbitmq_link.arm(slow)
    try:
        await asyncio.sleep(AWAKE_SECONDS)
        await alone(system, rng.choice(system.roles["relay"]), freeze, seconds)
    finally:
        system.rabbitmq_link.disarm(slow)


def _service_faults() -> dict[str, Row]:
    rows = {}
    for role in ("api", "relay", "consumer", "janitor"):
        rows[f"{role}: kill -9"] = Row(role, (0.0, 2.0), _of_role(role, kill))
        rows[f"{role}: freeze past its lease"] = Row(role, (3.5, 5.0), _of_role(role, freeze))
        rows[f"{role}: restart"] = Row(role, (0.0, 0.5), _of_role(role, restart))
    return rows


FAULTS: dict[str, Row] = {
    **_service_faults(),
    "relay: freeze in the middle of a batch": Row("rabbitmq-link", (4.0, 6.0), _freeze_mid_publish),
}

"""Faults of a deployment: rolling restarts, also to the older release and back."""

import asyncio
import random

from chaos.runner import release
from chaos.runner.faults.acts import Row, alone
from chaos.runner.faults.services import restart
from chaos.runner.system import System
from tests.harness.processes import REPOSITORY

ROLL_BACK = f"deployment: roll back to {release.VERSION}, and forward again"


async def _roll(system: System, _: random.Random, seconds: float) -> None:
    """Restart every process, one at a time."""
    for service in system.services:
        await alone(system, service, restart, seconds)


async def _roll_back_and_forward(system: System, rng: random.Random, seconds: float) -> None:
    """Replace every process by one of the older release, one at a time and in any order; then the other way round."""
    older = await release.unpack(system.directory)
    logs = {service.url: service.log for service in system.services}
    pause = seconds / (2 * len(system.services))
    for code, prefix in ((older, f"{release.VERSION}-"), (REPOSITORY, "")):
        for service in rng.sample(system.services, len(system.services)):
            log = logs[service.url]
            async with system.busy[service.url]:
                service.code, service.log = code, log.with_name(prefix + log.name)
                await restart(service, 0.0)
            await asyncio.sleep(pause)


def impossible() -> dict[str, str]:
    """Return the faults that cannot be injected on this machine, each with the reason."""
    if release.is_in_history():
        return {}
    return {ROLL_BACK: f"commit {release.COMMIT[:10]} is not in the git history: this is a shallow clone or an archive"}


FAULTS: dict[str, Row] = {
    "all roles: rolling restart": Row("deployment", (0.0, 0.1), _roll),
    ROLL_BACK: Row("deployment", (20.0, 40.0), _roll_back_and_forward),
}

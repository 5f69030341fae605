"""The faults: each is a coroutine that does its damage, lets it last, and repairs what does not repair itself.

Nothing here repairs the service's data: leases, retries, the inbox, the resender and compensation have to. Each part of
the system has a module with a table of its faults; `acts` has what they are made of.
"""

import random

from chaos.runner.faults import (
    broker_nodes,
    clocks,
    deployment,
    failover,
    partners,
    postgres,
    rabbitmq,
    redis,
    services,
)
from chaos.runner.faults.acts import Row
from chaos.runner.schedule import FaultKind, Injection
from chaos.runner.system import System

PARTS = (services, deployment, postgres, failover, redis, rabbitmq, broker_nodes, partners, clocks)
FAULTS: dict[str, Row] = {name: row for part in PARTS for name, row in part.FAULTS.items()}


async def inject(injection: Injection, system: System) -> None:
    """Inject one fault, and return when it is over."""
    rng = random.Random(injection.seed)  # noqa: S311 - reproducible, not secret
    await FAULTS[injection.kind.name].inject(system, rng, injection.seconds)


def kinds(nodes: int = 1) -> list[FaultKind]:
    """Return all kinds of faults that are possible with so many nodes of the broker."""
    return [
        FaultKind(name, row.component, row.seconds, row.repair_seconds)
        for name, row in FAULTS.items()
        if nodes > 1 or name not in broker_nodes.FAULTS
    ]


def impossible() -> dict[str, str]:
    """Return the faults that cannot be injected on this machine, each with the reason."""
    return deployment.impossible()

"""Faults of single nodes of RabbitMQ. With three of them, the other two have every message."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from chaos.proxy.proxy import HOST
from chaos.runner.broker import Node
from chaos.runner.faults.acts import Inject, Row, freeze, kill
from chaos.runner.system import System


def _leave(system: System, node: Node) -> None:
    """Let new connections use another node, as a load balancer does."""
    system.rabbitmq.leave(node)
    system.rabbitmq_link.redirect(HOST, system.rabbitmq.port)


def _on_one(act: Callable[[Node, float], Awaitable[None]]) -> Inject:
    async def hit(system: System, rng: random.Random, seconds: float) -> None:
        # Rather the node that serves the service: to lose another one is harmless.
        node = system.rabbitmq.present if rng.random() < 0.7 else rng.choice(system.rabbitmq.nodes)  # noqa: PLR2004
        _leave(system, node)
        await act(node, seconds)

    return hit


async def _roll(system: System, _: random.Random, seconds: float) -> None:
    """Restart all nodes, one at a time, as an upgrade does."""
    for node in system.rabbitmq.nodes:
        _leave(system, node)
        await node.stop()
        await asyncio.sleep(seconds)
        await node.start()


FAULTS: dict[str, Row] = {
    "rabbitmq node: kill -9": Row("rabbitmq", (0.0, 5.0), _on_one(kill), 8.0),
    "rabbitmq node: freeze": Row("rabbitmq", (1.0, 10.0), _on_one(freeze)),
    "rabbitmq nodes: rolling restart": Row("rabbitmq", (0.0, 1.0), _roll, 30.0),
}

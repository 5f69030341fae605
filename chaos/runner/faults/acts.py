"""What faults have in common: the row of a fault, and the acts that several of them consist of."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from chaos.proxy.faults import Fault
from chaos.proxy.proxy import Proxy
from chaos.runner.system import System
from tests.harness.processes import Service

CALL_SECONDS = 15.0

Inject = Callable[[System, random.Random, float], Awaitable[None]]


class Server(Protocol):
    """What can be killed and frozen."""

    async def kill(self) -> None:
        """SIGKILL every process of it."""

    async def start(self) -> None:
        """Start it again, on the same data and port."""

    def freeze(self) -> None:
        """Stop every process of it (SIGSTOP)."""

    def thaw(self) -> None:
        """Continue them (SIGCONT)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of fault: what it affects, its shortest and longest time, and how it is injected."""

    component: str
    seconds: tuple[float, float]
    inject: Inject
    repair_seconds: float = 0.0


async def kill(server: Server, seconds: float) -> None:
    """Kill a server, and start it again after a while."""
    await server.kill()
    await asyncio.sleep(seconds)
    await server.start()


async def freeze(server: Server, seconds: float) -> None:
    """Freeze a server for a while."""
    server.freeze()
    try:
        await asyncio.sleep(seconds)
    finally:
        server.thaw()


async def arm(link: Proxy, seconds: float, *faults: Fault) -> None:
    """Let a link misbehave for a while."""
    for fault in faults:
        link.arm(fault)
    try:
        await asyncio.sleep(seconds)
    finally:
        for fault in faults:
            link.disarm(fault)


def killing(server: Callable[[System], Server]) -> Inject:
    """Return a fault that kills this server."""

    async def inject(system: System, _: random.Random, seconds: float) -> None:
        await kill(server(system), seconds)

    return inject


def freezing(server: Callable[[System], Server]) -> Inject:
    """Return a fault that freezes this server."""

    async def inject(system: System, _: random.Random, seconds: float) -> None:
        await freeze(server(system), seconds)

    return inject


def arming(link: Callable[[System], Proxy], *faults: Fault) -> Inject:
    """Return a fault that lets this link misbehave."""

    async def inject(system: System, _: random.Random, seconds: float) -> None:
        await arm(link(system), seconds, *faults)

    return inject


def cutting(link: Callable[[System], Proxy]) -> Inject:
    """Return a fault that cuts all connections of this link twice."""

    async def inject(system: System, _: random.Random, seconds: float) -> None:
        link(system).cut()
        await asyncio.sleep(seconds)
        link(system).cut()

    return inject


async def alone(
    system: System, service: Service, act: Callable[[Service, float], Awaitable[None]], seconds: float
) -> None:
    """Hit a process when no other fault does: one that is being restarted cannot be killed."""
    async with system.busy[service.url]:
        await act(service, seconds)

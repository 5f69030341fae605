"""The faults: each is a coroutine that does its damage, lets it last, and repairs what does not repair itself.

Nothing here repairs the service's data: leases, retries, the inbox, the resender and compensation have to.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import aio_pika
import asyncpg
import httpx
import redis.asyncio

from chaos.proxy import amqp, postgres
from chaos.proxy.faults import Blackhole, Delay, Double, Eat, Fault, Lose, Overtake, Throttle
from chaos.proxy.proxy import Proxy
from chaos.runner.schedule import FaultKind, Injection
from chaos.runner.system import DEADLINE_SECONDS, System
from sandbox import faults as partner_faults
from tests.harness.processes import Service

QUEUE, DEAD_LETTER_QUEUE, EXCHANGE = "orders.saga", "orders.saga.dlq", "orders.events"
TARGETS = get_args(partner_faults.FaultTarget)
PARTNER_KINDS = tuple(kind for kind in get_args(partner_faults.FaultKind) if kind != "refuse")  # a refusal is no fault
SLOW_SECONDS = 0.3
PAST_DEADLINE_SECONDS = DEADLINE_SECONDS + 2.0
AWAKE_SECONDS = 0.7  # between two freezes: enough to take leases
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
class _Row:
    component: str
    seconds: tuple[float, float]
    inject: Inject


async def inject(injection: Injection, system: System) -> None:
    """Inject one fault, and return when it is over."""
    rng = random.Random(injection.seed)  # noqa: S311 - reproducible, not secret
    await FAULTS[injection.kind.name].inject(system, rng, injection.seconds)


def kinds() -> list[FaultKind]:
    """Return all kinds of faults."""
    return [FaultKind(name, row.component, row.seconds) for name, row in FAULTS.items()]


async def _kill(server: Server, seconds: float) -> None:
    await server.kill()
    await asyncio.sleep(seconds)
    await server.start()


async def _freeze(server: Server, seconds: float) -> None:
    server.freeze()
    try:
        await asyncio.sleep(seconds)
    finally:
        server.thaw()


async def _arm(link: Proxy, seconds: float, *faults: Fault) -> None:
    for fault in faults:
        link.arm(fault)
    try:
        await asyncio.sleep(seconds)
    finally:
        for fault in faults:
            link.disarm(fault)


def _killing(server: Callable[[System], Server]) -> Inject:
    async def kill(system: System, _: random.Random, seconds: float) -> None:
        await _kill(server(system), seconds)

    return kill


def _freezing(server: Callable[[System], Server]) -> Inject:
    async def freeze(system: System, _: random.Random, seconds: float) -> None:
        await _freeze(server(system), seconds)

    return freeze


def _arming(link: Callable[[System], Proxy], *faults: Fault) -> Inject:
    async def arm(system: System, _: random.Random, seconds: float) -> None:
        await _arm(link(system), seconds, *faults)

    return arm


def _cutting(link: Callable[[System], Proxy]) -> Inject:
    async def cut(system: System, _: random.Random, seconds: float) -> None:
        link(system).cut()
        await asyncio.sleep(seconds)
        link(system).cut()

    return cut


def _of_role(role: str, act: Callable[[Service, float], Awaitable[None]]) -> Inject:
    """Hit one process of a role, or now and then all of them."""

    async def hit(system: System, rng: random.Random, seconds: float) -> None:
        services = system.roles[role]
        victims = services if rng.random() < 0.3 else [rng.choice(services)]  # noqa: PLR2004 - now and then
        await asyncio.gather(*(_alone(system, service, act, seconds) for service in victims))

    return hit


async def _alone(
    system: System, service: Service, act: Callable[[Service, float], Awaitable[None]], seconds: float
) -> None:
    """Hit a process when no other fault does: one that is being restarted cannot be killed."""
    async with system.busy[service.url]:
        await act(service, seconds)


async def _restart(service: Service, seconds: float) -> None:
    await service.terminate()
    await asyncio.sleep(seconds)
    await service.start()


async def _freeze_mid_publish(system: System, rng: random.Random, seconds: float) -> None:
    """Freeze a relay for longer than its lease while a slow link keeps its events on their way; another takes over."""
    slow = Delay(seconds=SLOW_SECONDS)
    system.rabbitmq_link.arm(slow)
    try:
        await asyncio.sleep(AWAKE_SECONDS)
        await _alone(system, rng.choice(system.roles["relay"]), _freeze, seconds)
    finally:
        system.rabbitmq_link.disarm(slow)


async def _roll(system: System, _: random.Random, seconds: float) -> None:
    """Restart every process, one at a time, as a deployment does."""
    for service in system.services:
        await _alone(system, service, _restart, seconds)


async def _kill_rabbitmq(system: System, _: random.Random, seconds: float) -> None:
    # RabbitMQ 3 loses a queue that was declared within the last second, and does not recover from that.
    await system.rabbitmq.sync()
    await _kill(system.rabbitmq, seconds)


async def _end_sessions(system: System, _: random.Random, __: float) -> None:
    await _execute(
        system,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename IS NOT NULL",
    )


async def _execute(system: System, statement: str) -> None:
    conn = await asyncpg.connect(system.postgres.url, timeout=CALL_SECONDS)
    try:
        await conn.execute(statement)
    finally:
        conn.terminate()


async def _hold_a_snapshot(system: System, _: random.Random, seconds: float) -> None:
    conn = await asyncpg.connect(system.postgres.url, timeout=CALL_SECONDS)
    try:
        await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM orders")
        await asyncio.sleep(seconds)
    finally:
        conn.terminate()


async def _flush_redis(system: System, _: random.Random, __: float) -> None:
    async with redis.asyncio.Redis.from_url(system.redis.url) as client:
        await client.flushall()


@contextlib.asynccontextmanager
async def _channel(system: System) -> Any:
    async with await aio_pika.connect(system.rabbitmq.url(), timeout=CALL_SECONDS) as connection:
        yield await connection.channel()


async def _unbind(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        queue = await channel.get_queue(QUEUE)
        await queue.unbind(EXCHANGE, "order.placed")


async def _delete_queue(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        await channel.queue_delete(QUEUE)


async def _purge_dead_letters(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        queue = await channel.get_queue(DEAD_LETTER_QUEUE)
        await queue.purge()


async def _send_rubbish(system: System, rng: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        exchange = await channel.get_exchange(EXCHANGE)
        for body in (b"", b"{", b"null", rng.randbytes(200)):
            await exchange.publish(aio_pika.Message(body), "order.placed")


async def _let_partners_act_late(system: System, rng: random.Random, seconds: float) -> None:
    """Let calls take effect after their order's deadline, when they have been undone already."""
    target = rng.choice(("inventory.hold", "payment.charge"))
    await _set_rules(system, seconds, {"target": target, "kind": "slow", "delay_seconds": PAST_DEADLINE_SECONDS})


async def _let_partners_fail(system: System, rng: random.Random, seconds: float) -> None:
    rules: list[Mapping[str, Any]] = [
        {
            "target": rng.choice(TARGETS),
            "kind": rng.choice(PARTNER_KINDS),
            "probability": rng.choice((0.3, 0.6, 1.0)),
            "delay_seconds": SLOW_SECONDS,
        }
        for _ in range(rng.randint(1, 4))
    ]
    await _set_rules(system, seconds, *rules)


async def _set_rules(system: System, seconds: float, *rules: Mapping[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=system.sandbox.url, trust_env=False, timeout=CALL_SECONDS) as sandbox:
        (await sandbox.put("/faults", json=rules)).raise_for_status()
        try:
            await asyncio.sleep(seconds)
        finally:
            (await sandbox.delete("/faults")).raise_for_status()


def _service_faults() -> dict[str, _Row]:
    rows = {}
    for role in ("api", "relay", "consumer", "janitor"):
        rows[f"{role}: kill -9"] = _Row(role, (0.0, 2.0), _of_role(role, _kill))
        rows[f"{role}: freeze past its lease"] = _Row(role, (3.5, 5.0), _of_role(role, _freeze))
        rows[f"{role}: restart"] = _Row(role, (0.0, 0.5), _of_role(role, _restart))
    return rows


FAULTS: dict[str, _Row] = {
    **_service_faults(),
    "relay: freeze in the middle of a batch": _Row("rabbitmq-link", (4.0, 6.0), _freeze_mid_publish),
    "postgres: kill -9": _Row("postgres", (0.2, 2.0), _killing(lambda system: system.postgres)),
    "postgres: freeze": _Row("postgres", (0.5, 3.0), _freezing(lambda system: system.postgres)),
    "postgres: end all sessions": _Row("postgres", (0.0, 0.0), _end_sessions),
    "postgres: hold a snapshot": _Row("snapshot", (5.0, 15.0), _hold_a_snapshot),
    "link to postgres: cut": _Row("postgres-link", (0.1, 0.5), _cutting(lambda system: system.postgres_link)),
    "link to postgres: hold half of the connections past a lease": _Row(
        "postgres-link", (3.5, 4.5), _arming(lambda system: system.postgres_link, Blackhole(probability=0.5))
    ),
    "link to postgres: slow": _Row(
        "postgres-link", (2.0, 5.0), _arming(lambda system: system.postgres_link, Delay(seconds=0.05))
    ),
    "link to postgres: lose answers to COMMIT": _Row(
        "postgres-link",
        (2.0, 5.0),
        _arming(lambda system: system.postgres_link, Lose(postgres.COMMIT_ANSWER, probability=0.1)),
    ),
    "link to postgres: lose COMMITs": _Row(
        "postgres-link",
        (2.0, 5.0),
        _arming(lambda system: system.postgres_link, Lose(postgres.COMMIT_REQUEST, probability=0.1)),
    ),
    "redis: kill -9": _Row("redis", (0.2, 3.0), _killing(lambda system: system.redis)),
    "redis: freeze": _Row("redis", (0.5, 4.0), _freezing(lambda system: system.redis)),
    "redis: flush": _Row("redis", (0.0, 0.0), _flush_redis),
    "rabbitmq: kill -9": _Row("rabbitmq", (0.0, 2.0), _kill_rabbitmq),
    "rabbitmq: freeze": _Row("rabbitmq", (1.0, 5.0), _freezing(lambda system: system.rabbitmq)),
    "rabbitmq: unbind the queue": _Row("rabbitmq", (0.0, 0.0), _unbind),
    "rabbitmq: delete the queue": _Row("rabbitmq", (0.0, 0.0), _delete_queue),
    "rabbitmq: purge dead letters": _Row("rabbitmq", (0.0, 0.0), _purge_dead_letters),
    "rabbitmq: rubbish messages": _Row("rabbitmq", (0.0, 0.0), _send_rubbish),
    "link to rabbitmq: cut": _Row("rabbitmq-link", (0.1, 0.5), _cutting(lambda system: system.rabbitmq_link)),
    "link to rabbitmq: slow": _Row(
        "rabbitmq-link", (2.0, 5.0), _arming(lambda system: system.rabbitmq_link, Throttle(bytes_per_second=40_000))
    ),
    "link to rabbitmq: lose confirms and acknowledgements": _Row(
        "rabbitmq-link",
        (2.0, 5.0),
        _arming(
            lambda system: system.rabbitmq_link,
            Eat(amqp.CONFIRM, probability=0.1),
            Eat(amqp.ACKNOWLEDGEMENT, probability=0.1),
        ),
    ),
    "link to rabbitmq: double and reorder deliveries": _Row(
        "rabbitmq-link",
        (2.0, 5.0),
        _arming(
            lambda system: system.rabbitmq_link,
            Double(amqp.DELIVERY, probability=0.3),
            Overtake(amqp.DELIVERY, probability=0.2),
        ),
    ),
    "partners: kill -9": _Row("partners", (0.2, 3.0), _killing(lambda system: system.sandbox)),
    "partners: freeze": _Row("partners", (0.5, 4.0), _freezing(lambda system: system.sandbox)),
    # Longer than the deadline, or a retry would succeed before it.
    "partners: act after the deadline": _Row("partners", (13.0, 15.0), _let_partners_act_late),
    "partners: errors, timeouts, resets, garbage": _Row("partners", (3.0, 8.0), _let_partners_fail),
    "all roles: rolling restart": _Row("deployment", (0.0, 0.1), _roll),
}

"""Rows that measure the service alone: latency at an even rate, and what it uses while nothing happens."""

import asyncio

import asyncpg

from bench.client import Client, Traffic, new_keys, orders
from bench.lab import Contender, Lab
from bench.measure import WARM_UP_SECONDS, Meter
from bench.rounds import Comparison, Plan, ratio
from bench.rows.finished import partners

PER_SECOND = 50.0
CLIENTS = 32
LATENCY_SECONDS, IDLE_SECONDS = 10.0, 20.0
POLL_SECONDS, PATIENCE_SECONDS = 0.5, 1800.0
LATENCIES = ("201 p50", "201 p99", "confirmed p50", "confirmed p99")
CONFIRMED = "SELECT NOT EXISTS (SELECT FROM orders WHERE status <> 'confirmed')"
PERCENTILES = """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM updated_at - placed_at) * 1000)
    FROM (SELECT * FROM orders ORDER BY placed_at DESC LIMIT $1) newest
"""


async def latency(lab: Lab, plan: Plan) -> Comparison:
    """Measure the 201, and the time from placed to confirmed, with 50 new orders a second."""
    seconds = plan.seconds if plan.smoke else LATENCY_SECONDS
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    async with partners(lab) as called, lab.service(partners_url=called.url) as service:
        conn = await asyncpg.connect(service.url)
        try:
            for _ in range(plan.rounds):
                figures = await paced(service, conn, CLIENTS, PER_SECOND, seconds)
                for name, values in found.items():
                    values.append(figures[name])
        finally:
            await conn.close()
    return Comparison("milliseconds", figures={name: ratio(values) for name, values in found.items()})


async def paced(
    service: Contender, conn: asyncpg.Connection, clients: int, per_second: float, seconds: float
) -> dict[str, float]:
    """Place orders at even times, and wait until they are confirmed. Return the latencies in milliseconds."""
    async with Client(service.port, clients, orders(new_keys())) as client:
        await client.pace(WARM_UP_SECONDS, per_second)
        traffic: Traffic = await client.pace(seconds, per_second)
    await all_confirmed(conn)
    confirmed = await conn.fetchval(PERCENTILES, int(seconds * per_second))
    figures = (traffic.percentile_ms(0.5), traffic.percentile_ms(0.99), *confirmed)
    return dict(zip(LATENCIES, figures, strict=True))


async def all_confirmed(conn: asyncpg.Connection) -> None:
    """Return when all orders are confirmed. It asks seldom: the question reads the whole table."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await conn.fetchval(CONFIRMED):  # noqa: ASYNC110 - the condition is in the database
            await asyncio.sleep(POLL_SECONDS)


async def idle(lab: Lab, plan: Plan) -> Comparison:
    """Measure what all roles in one process use while nothing happens."""
    cpu, statements = [], []
    async with partners(lab) as called, lab.service(partners_url=called.url) as service:
        meter = Meter(lab, service)
        for _ in range(plan.rounds):
            before = await meter.read()
            await asyncio.sleep(plan.seconds if plan.smoke else IDLE_SECONDS)
            after = await meter.read()
            seconds = after.at - before.at
            cpu.append((after.cpu - before.cpu) / seconds * 100)
            statements.append((after.statements - before.statements) / seconds)
    return Comparison("per second", figures={"CPU %": ratio(cpu), "statements/s": ratio(statements)})

"""Rows that measure the service alone: latency at an even rate, and what it uses while nothing happens."""

import asyncio

import asyncpg

from bench.client import Client, Traffic, new_keys, orders
from bench.lab import Lab
from bench.measure import WARM_UP_SECONDS, Meter
from bench.rounds import Comparison, Plan, ratio
from bench.rows.finished import partners
from tests.harness.wait import wait_until

PER_SECOND = 50.0
CLIENTS = 32
LATENCY_SECONDS, IDLE_SECONDS = 10.0, 20.0
QUIET_SECONDS = 60.0
CONFIRMED = "SELECT NOT EXISTS (SELECT FROM orders WHERE status <> 'confirmed')"
PERCENTILES = """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM updated_at - placed_at) * 1000)
    FROM (SELECT * FROM orders ORDER BY placed_at DESC LIMIT $1) newest
"""


async def latency(lab: Lab, plan: Plan) -> Comparison:
    """Measure the 201, and the time from placed to confirmed, with 50 new orders a second."""
    seconds = plan.seconds if plan.smoke else LATENCY_SECONDS
    found: dict[str, list[float]] = {name: [] for name in ("201 p50", "201 p99", "confirmed p50", "confirmed p99")}
    async with partners(lab) as called, lab.service(partners_url=called.url) as service:
        conn = await asyncpg.connect(service.url)
        try:
            for _ in range(plan.rounds):
                async with Client(service.port, CLIENTS, orders(new_keys())) as client:
                    await client.pace(WARM_UP_SECONDS, PER_SECOND)
                    traffic: Traffic = await client.pace(seconds, PER_SECOND)
                await wait_until(lambda: conn.fetchval(CONFIRMED), QUIET_SECONDS, "all orders confirmed")
                confirmed = await conn.fetchval(PERCENTILES, int(seconds * PER_SECOND))
                figures = (traffic.percentile_ms(0.5), traffic.percentile_ms(0.99), *confirmed)
                for values, figure in zip(found.values(), figures, strict=True):
                    values.append(figure)
        finally:
            await conn.close()
    return Comparison("milliseconds", figures={name: ratio(values) for name, values in found.items()})


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

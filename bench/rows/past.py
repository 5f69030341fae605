"""Rows about what lies behind: a million past orders, and a session that holds a snapshot, as a backup does.

Both finish orders as the row `finished` does. They compare the service with itself on an empty database.
"""

import contextlib
from collections.abc import AsyncIterator

import asyncpg

from bench.lab import Contender, Lab
from bench.rounds import Comparison, Plan, ratio
from bench.rows.finished import Partners, compare_finished, partners
from tests.harness.history import lived_through

PAST_ORDERS, SMOKE_ORDERS = 1_000_000, 1_000
PORTION = 50_000  # inserted at once
SNAPSHOT_ROUNDS, SNAPSHOT_SECONDS = 5, 20.0  # long enough for some ten thousand entries that cannot be removed
WITHOUT = "without"
CLAIMS = """
    SELECT coalesce(sum(total_exec_time), 0), coalesce(sum(calls), 0)::bigint
    FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
    WHERE d.datname = $1 AND query LIKE '%SKIP LOCKED%'
"""


async def growth(lab: Lab, plan: Plan) -> Comparison:
    """Compare the service on a database with a million past orders with the service on an empty one."""
    async with _pair(lab) as (service, without, called, stack):
        await _fill(service.url, SMOKE_ORDERS if plan.smoke else PAST_ORDERS)
        return await compare_finished(lab, plan, [service, without], called, stack)


async def snapshot(lab: Lab, plan: Plan) -> Comparison:
    """Compare the service while a session holds a snapshot with the service without one; also the time of a claim."""
    long = plan if plan.smoke else Plan(SNAPSHOT_ROUNDS, SNAPSHOT_SECONDS)
    async with _pair(lab) as (service, without, called, stack):
        holder = await asyncpg.connect(service.url)
        stack.push_async_callback(holder.close)
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM orders")
        comparison = await compare_finished(lab, long, [service, without], called, stack)
        held, free = [await _claim_milliseconds(lab, contender) for contender in (service, without)]
        comparison.figures["claim: ms with a snapshot"] = ratio([held])
        comparison.figures["claim: ms without"] = ratio([free])
        comparison.figures["claim: with ÷ without"] = ratio([held / free])
        return comparison


@contextlib.asynccontextmanager
async def _pair(lab: Lab) -> AsyncIterator[tuple[Contender, Contender, Partners, contextlib.AsyncExitStack]]:
    """Run the service twice, each on a database of its own."""
    async with contextlib.AsyncExitStack() as stack:
        called = await stack.enter_async_context(partners(lab))
        service = await stack.enter_async_context(lab.service(partners_url=called.url))
        without = await stack.enter_async_context(lab.service(name=WITHOUT, partners_url=called.url))
        yield service, without, called, stack


async def _fill(url: str, orders: int) -> None:
    """Leave behind what so many orders do that ended within a day: the pruner would be busy with older ones."""
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
        for portion in range(0, orders, PORTION):
            await lived_through(pool, min(PORTION, orders - portion), f"{2 + portion / PORTION:.0f} hours")
        async with pool.acquire() as conn:
            await conn.execute("VACUUM ANALYZE")


async def _claim_milliseconds(lab: Lab, contender: Contender) -> float:
    """Return the mean time of a claim, in Postgres, since the contender started."""
    [(total, calls)] = await lab.statistics.fetch(CLAIMS, contender.url.rpartition("/")[2])
    return float(total) / max(int(calls), 1)

"""The price of the indexes by which operators search: the service with them, and without.

Every order has a trace id, as with tracing on, but none is sampled: otherwise the spans would hide the price.
"""

import contextlib

import asyncpg

from bench.lab import Lab
from bench.rounds import Comparison, Plan, ratio
from bench.rows.finished import ORDERS, compare_finished, partners
from tests.harness.ports import free_port

INDEXES = ("orders_tracking_id_idx", "saga_steps_payment_id_idx", "sagas_trace_id_idx")
WITHOUT = "without"
UNSAMPLED = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "always_off"}
WAL = """
    SELECT coalesce(sum(wal_bytes), 0)::float8 FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
    WHERE d.datname = $1
"""


async def search(lab: Lab, plan: Plan) -> Comparison:
    """Compare the service with one whose database lacks the indexes for the search; also the WAL that each writes."""
    tracing = {**UNSAMPLED, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    async with contextlib.AsyncExitStack() as stack:
        called = await stack.enter_async_context(partners(lab))
        service = await stack.enter_async_context(lab.service(partners_url=called.url, **tracing))
        without = await stack.enter_async_context(lab.service(name=WITHOUT, partners_url=called.url, **tracing))
        conns = [await asyncpg.connect(contender.url) for contender in (service, without)]
        for conn in conns:
            stack.push_async_callback(conn.close)
        await conns[1].execute(f"DROP INDEX {', '.join(INDEXES)}")
        comparison = await compare_finished(lab, plan, [service, without], called, stack)
        for contender, conn in zip((service, without), conns, strict=True):
            orders, _ = (await conn.fetch(ORDERS))[0]
            written = await lab.statistics.fetchval(WAL, contender.url.rpartition("/")[2])
            comparison.figures[f"{contender.name}: WAL bytes per order"] = ratio([written / orders])
        return comparison

"""Publish events: outbox rows that wait, in batches of 200, and no consumer runs.

The rows are copies of one that the service has written, each of an order of its own. The relay claims them, publishes
them persistent, mandatory and confirmed, and records each as published. The floor only publishes.
"""

import asyncio
import contextlib
from functools import partial

import asyncpg

from bench.client import Traffic, new_keys, orders, send_each
from bench.lab import Contender, Lab
from bench.measure import Meter, Sample, observe
from bench.rounds import Comparison, Plan, compare
from tests.harness.wait import wait_until

BATCH = 200
BATCHES = 50
MESSAGE_BYTES = "600"
WAIT_SECONDS = 300.0
ADD = """
    INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at)
    SELECT gen_random_uuid(), type, gen_random_uuid()::text, sequence, tenant, data, clock_timestamp()
    FROM (SELECT * FROM outbox LIMIT 1) model, generate_series(1, $1::integer)
"""
DONE = "SELECT NOT EXISTS (SELECT FROM outbox WHERE published_at IS NULL)"
# From the first batch to the last: how long the relay waited for its poll does not count.
SECONDS = """
    SELECT extract(epoch FROM max(published_at) - min(published_at))::float8
    FROM (SELECT published_at FROM outbox ORDER BY published_at DESC LIMIT $1) newest
"""


async def relay(lab: Lab, plan: Plan) -> Comparison:
    """Compare with aio-pika's own rate."""
    batches = 2 if plan.smoke else BATCHES
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(lab.service(["api", "relay"]))
        floor = await stack.enter_async_context(lab.floor("aio_pika_only", MESSAGE_BYTES=MESSAGE_BYTES))
        conn = await asyncpg.connect(service.url)
        stack.push_async_callback(conn.close)
        await send_each(service.port, 1, [next(orders(new_keys()))])
        windows = {
            "service": partial(publish, lab, service, conn, batches),
            "aio_pika_only": partial(publish_only, lab, floor, batches),
        }
        return await compare("events published", plan, windows)


async def publish(lab: Lab, service: Contender, conn: asyncpg.Connection, batches: int) -> Sample:
    """Add rows to the outbox, and return when the relay has published them."""

    async def load() -> Traffic:
        await conn.execute(ADD, batches * BATCH)
        await wait_until(lambda: conn.fetchval(DONE), WAIT_SECONDS, "all events published")
        # The first batch is not in these seconds, so it is not in the count either.
        return Traffic(await conn.fetchval(SECONDS, batches * BATCH), [0.0] * ((batches - 1) * BATCH))

    return await observe(Meter(lab, service), load)


async def publish_only(lab: Lab, floor: Contender, batches: int) -> Sample:
    """Ask the floor for its seconds."""

    async def load() -> Traffic:
        reader, writer = await asyncio.open_connection("127.0.0.1", floor.port)
        writer.write(b"%d\n" % batches)
        seconds = float(await reader.readline())
        writer.close()
        return Traffic(seconds, [0.0] * (batches * BATCH))

    return await observe(Meter(lab, floor), load)

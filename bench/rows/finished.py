"""Finish orders: accept, publish, consume, four partner calls, confirmed. 128 orders are open at any time.

A closed loop: the client places a new order whenever the partners create a shipment, so no contender looks better by
accepting more than it finishes. An order counts when its contender has committed that it is confirmed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import asyncpg

from bench.client import Client, new_keys, orders
from bench.lab import Contender, Lab
from bench.measure import WARM_UP_SECONDS, Meter, Sample, observe
from bench.rounds import Comparison, Plan, Window, compare
from tests.harness.ports import free_port
from tests.harness.wait import wait_until

OPEN = 128
FLOORS = ("orm", "core", "hand_made")
QUIET_SECONDS = 60.0
DBOS_SECONDS = 30.0  # it polls and batches: short windows would favour whichever state it is in
ORDERS = "SELECT count(*) FILTER (WHERE status = 'confirmed'), count(*) FROM orders"
WORKFLOWS = "SELECT count(*) FILTER (WHERE status = 'SUCCESS'), count(*) FROM dbos.workflow_status"


@dataclass
class Partners:
    """The running partners: their URL, and the port that reports shipments."""

    url: str
    finished_port: int


@contextlib.asynccontextmanager
async def partners(lab: Lab) -> AsyncIterator[Partners]:
    """Run the partners that all contenders call."""
    port = free_port()
    async with lab.program("partners", ["-m", "bench.partners"], {"FINISHED_PORT": str(port)}) as program:
        yield Partners(f"http://127.0.0.1:{program.port}", port)


class Books:
    """What a contender has stored. `query`: finished orders, and all."""

    def __init__(self, conn: asyncpg.Connection, query: str) -> None:
        self._conn = conn
        self._query = query

    async def confirmed(self) -> int:
        """Return how many orders have ended."""
        return int(await self._conn.fetchval(self._query))

    async def is_quiet(self) -> bool:
        """Return whether every order has ended."""
        done, placed = (await self._conn.fetch(self._query))[0]
        return bool(done == placed)


async def finished(lab: Lab, plan: Plan) -> Comparison:
    """Compare with the usual ORM service, with SQLAlchemy Core and aiohttp, and with a service made by hand."""
    async with contextlib.AsyncExitStack() as stack:
        called = await stack.enter_async_context(partners(lab))
        contenders = [
            await stack.enter_async_context(lab.service(partners_url=called.url)),
            *[await stack.enter_async_context(lab.floor(name, PARTNERS_URL=called.url)) for name in FLOORS],
        ]
        return await compare_finished(lab, plan, contenders, called, stack)


async def finished_dbos(lab: Lab, plan: Plan) -> Comparison:
    """Compare with DBOS: one workflow per order, with a step for each partner call."""
    long = plan if plan.smoke else Plan(plan.rounds, DBOS_SECONDS)
    async with contextlib.AsyncExitStack() as stack:
        called = await stack.enter_async_context(partners(lab))
        contenders = [
            await stack.enter_async_context(contender)
            for contender in (lab.service(partners_url=called.url), lab.peer("dbos_orders", PARTNERS_URL=called.url))
        ]
        return await compare_finished(lab, long, contenders, called, stack)


async def compare_finished(
    lab: Lab, plan: Plan, contenders: list[Contender], called: Partners, stack: contextlib.AsyncExitStack
) -> Comparison:
    """Compare how many orders the first contender finishes with each of the others; `stack` closes what this opens."""
    windows: dict[str, Window] = {}
    for contender in contenders:
        conn = await asyncpg.connect(contender.url)
        stack.push_async_callback(conn.close)
        query = WORKFLOWS if contender.name == "dbos_orders" else ORDERS
        windows[contender.name] = partial(finish, lab, contender, Books(conn, query), called, plan.seconds)
    return await compare("orders finished", plan, windows)


async def finish(lab: Lab, contender: Contender, books: Books, called: Partners, seconds: float) -> Sample:
    """Keep orders open for a window; return when the last one has ended."""
    async with kept_open([contender.port], books, called) as client:
        sample = await observe(Meter(lab, contender), partial(client.collect, seconds), books.confirmed)
    await wait_until(books.is_quiet, QUIET_SECONDS, f"end of the orders of {contender.name}")
    return sample


@contextlib.asynccontextmanager
async def kept_open(ports: Sequence[int], books: Books, called: Partners) -> AsyncIterator[Client]:
    """Keep OPEN orders open for each process. Yield the client when the flow is steady; then only collect."""
    count = OPEN * len(ports)
    async with Client(ports, OPEN, orders(new_keys())) as client, _replaced(client, called, count) as stop:
        steady = await books.confirmed() + count  # by then the first orders, which all began together, have ended
        async with asyncio.timeout(QUIET_SECONDS):
            while await books.confirmed() < steady:
                await client.collect(WARM_UP_SECONDS)
        yield client
        stop.set()
        await client.settle()


@contextlib.asynccontextmanager
async def _replaced(client: Client, called: Partners, count: int) -> AsyncIterator[asyncio.Event]:
    """Place `count` orders, and one more for each shipment until the event that this yields is set."""
    reader, writer = await asyncio.open_connection("127.0.0.1", called.finished_port)
    stop = asyncio.Event()

    async def replace() -> None:
        while shipments := await reader.read(4096):
            if not stop.is_set():
                client.owe(len(shipments))

    task = asyncio.create_task(replace())
    try:
        client.owe(count)
        yield stop
    finally:
        task.cancel()
        writer.close()

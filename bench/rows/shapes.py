"""Shapes of load, which have no floor: even load, a flash sale, a backlog, more processes, traces, a long run."""

import contextlib
import itertools
import resource
import time
from collections.abc import AsyncIterator, Sequence

import asyncpg
import psutil

from bench.client import Client, new_keys, orders, send_each
from bench.lab import Contender, Lab
from bench.measure import WARM_UP_SECONDS
from bench.rounds import Comparison, Plan, Ratio, ratio
from bench.rows.alone import all_confirmed, paced
from bench.rows.finished import OPEN, ORDERS, Books, Partners, compare_finished, finish, kept_open, partners

SHARES = (0.5, 0.9)  # of the rate at which the service finishes orders when it has all it can do
STEADY_SECONDS = 30.0
MOST_CLIENTS = 256
SALE, BACKLOGS, LONG = 10_000, (15_000, 100_000), 200_000
SMOKE = 200
FILES = 65_536  # a sale has a connection for each customer
PROCESSES = (1, 2, 4)
TRACED = (0.0, 0.1, 1.0)
TRACING = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
DURATION = "SELECT extract(epoch FROM max(updated_at) - $1) FROM orders"


async def even_load(lab: Lab, plan: Plan) -> Comparison:
    """Measure the latencies at a half and at nine tenths of the capacity, with new orders at even times."""
    seconds = plan.seconds if plan.smoke else STEADY_SECONDS
    figures: dict[str, Ratio] = {}
    async with _running(lab) as (service, called, conn):
        capacity = (await finish(lab, service, Books(conn, ORDERS), called, plan.seconds)).rate
        figures["capacity, orders/s"] = ratio([capacity])
        for share in SHARES:
            found = await paced(service, conn, MOST_CLIENTS, share * capacity, seconds)
            figures |= {f"{share:.0%}: {name}, ms": ratio([value]) for name, value in found.items()}
    return Comparison("milliseconds", figures=figures)


async def flash_sale(lab: Lab, plan: Plan) -> Comparison:
    """Place 10,000 orders at once, each on a connection of its own: each gets 201 or 503, and each 201 is finished.

    The service may have as many connections open; its default is 900, and a proxy in front shares them.
    """
    customers = SMOKE if plan.smoke else SALE
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    async with _running(lab, ORDERS_HTTP_MAX_CONNECTIONS=str(2 * SALE)) as (service, _, conn):
        async with Client(service.port, customers, orders(new_keys()), refusable=True) as client:
            client.owe(customers)
            await client.settle()
            traffic = client.traffic
        accepted, refused = len(traffic.latencies), traffic.refused
        placed = await conn.fetchval("SELECT count(*) FROM orders")  # a 503 may hide a commit
        if placed < accepted or accepted + refused != customers:
            raise RuntimeError(
                f"{customers} sent, {accepted} accepted, {refused} refused, but {placed} in the database"
            )
        begin = await conn.fetchval("SELECT min(placed_at) FROM orders")
        await all_confirmed(conn)
        figures = {
            "accepted": accepted,
            "refused with 503": refused,
            "refused, but placed": placed - accepted,
            "201 p50, ms": traffic.percentile_ms(0.5),
            "201 p99, ms": traffic.percentile_ms(0.99),
            "all accepted are confirmed after, s": await conn.fetchval(DURATION, begin),
        }
    return Comparison("orders", figures={name: ratio([float(value)]) for name, value in figures.items()})


async def backlog(lab: Lab, plan: Plan) -> Comparison:
    """Accept orders while nothing works them off, then start all roles and let them finish all."""
    figures: dict[str, Ratio] = {}
    async with partners(lab) as called:
        for count in (SMOKE,) if plan.smoke else BACKLOGS:
            deployment = await lab.deployment(f"backlog_{count}", called.url)
            async with lab.process(deployment, ["api"]) as intake:
                await send_each(intake.port, OPEN, list(itertools.islice(orders(new_keys()), count)))
            async with _connected(deployment.url) as conn, lab.process(deployment) as service:
                begin = await conn.fetchval("SELECT clock_timestamp()")
                await all_confirmed(conn)
                seconds = float(await conn.fetchval(DURATION, begin))
                figures[f"{count}: orders/s"] = ratio([count / seconds])
                figures[f"{count}: resident MiB"] = ratio([_resident_mib(service)])
    return Comparison("orders finished", figures=figures)


async def processes(lab: Lab, plan: Plan) -> Comparison:
    """Finish orders with one, two and four processes that share database and broker."""
    figures: dict[str, Ratio] = {}
    async with partners(lab) as called:
        for count in PROCESSES:
            deployment = await lab.deployment(f"processes_{count}", called.url)
            async with contextlib.AsyncExitStack() as stack:
                running = [await stack.enter_async_context(lab.process(deployment)) for _ in range(count)]
                conn = await stack.enter_async_context(_connected(deployment.url))
                rates = [await _rate([each.port for each in running], conn, called, plan) for _ in range(plan.rounds)]
                figures[f"{count}: orders/s"] = ratio(rates)
    return Comparison("orders finished", figures=figures)


async def tracing(lab: Lab, plan: Plan) -> Comparison:
    """Compare the service with traces (none sampled, a tenth, all) with the service without."""
    merged = Comparison("orders finished")
    for share in TRACED:
        name = f"traced_{100 * share:.0f}"
        async with contextlib.AsyncExitStack() as stack:
            called = await stack.enter_async_context(partners(lab))
            exporting = {**TRACING, "OTEL_TRACES_SAMPLER_ARG": str(share), "OTEL_EXPORTER_OTLP_ENDPOINT": called.url}
            without = await stack.enter_async_context(lab.service(partners_url=called.url))
            traced = await stack.enter_async_context(lab.service(name=name, partners_url=called.url, **exporting))
            found = await compare_finished(lab, plan, [without, traced], called, stack)
        merged.contenders[f"service, beside {name}"] = found.contenders["service"]
        merged.contenders[name] = found.contenders[name]
        merged.ratios |= found.ratios
        merged.cost_ratios |= found.cost_ratios
    return merged


async def long_run(lab: Lab, plan: Plan) -> Comparison:
    """Finish 200,000 orders, and measure the memory after each tenth of them."""
    tenth = (SMOKE if plan.smoke else LONG) // 10
    figures: dict[str, Ratio] = {}
    async with _running(lab) as (service, called, conn):
        books = Books(conn, ORDERS)
        async with kept_open([service.port], books, called) as client:
            for part in range(1, 11):
                while await books.confirmed() < part * tenth:
                    await client.collect(WARM_UP_SECONDS)
                figures[f"MiB after {part * tenth}"] = ratio([_resident_mib(service)])
        await all_confirmed(conn)
    return Comparison("resident memory", figures=figures)


@contextlib.asynccontextmanager
async def _running(lab: Lab, **env: str) -> AsyncIterator[tuple[Contender, Partners, asyncpg.Connection]]:
    """Run partners and the service; yield both, and a connection to its database."""
    async with (
        partners(lab) as called,
        lab.service(partners_url=called.url, **env) as service,
        _connected(service.url) as conn,
    ):
        yield service, called, conn


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(url)
    try:
        yield conn
    finally:
        await conn.close()


async def _rate(ports: Sequence[int], conn: asyncpg.Connection, called: Partners, plan: Plan) -> float:
    """Return how many orders are finished a second while OPEN are open for each process."""
    books = Books(conn, ORDERS)
    async with kept_open(ports, books, called) as client:
        before = await books.confirmed()
        begin = time.perf_counter()
        await client.collect(plan.seconds)
        rate = (await books.confirmed() - before) / (time.perf_counter() - begin)
    await all_confirmed(conn)
    return rate


def _resident_mib(contender: Contender) -> float:
    return psutil.Process(contender.pid).memory_info().rss / 2**20

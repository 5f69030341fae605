"""A failover: sessions on the demoted server are dropped, and writes continue within seconds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app import db
from app.errors import DatabaseUnavailable
from chaos.proxy import postgres
from chaos.proxy.faults import Delay
from chaos.proxy.proxy import Proxy
from tests.harness.api import assert_problem, serving
from tests.harness.databases import patient_pool
from tests.harness.installed import Postgres
from tests.harness.standby import Standby, fetchval, primary_and_standby
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}

Pair = tuple[Postgres, Standby]


@pytest.fixture
async def pair(server_directory: Path) -> AsyncIterator[Pair]:
    async with primary_and_standby(server_directory) as (primary, standby):
        await asyncio.to_thread(db.migrate, primary.url)
        await standby.catch_up(primary)
        yield primary, standby


def either(first: Postgres, second: Postgres) -> str:
    """Return the URL that names both servers, in this order."""
    return first.url.replace(f":{first.port}/", f":{first.port},127.0.0.1:{second.port}/")


async def becomes(api: httpx.AsyncClient, *statuses: int) -> None:
    """Wait for these responses to placing an order and to the readiness check."""

    async def seen() -> bool:
        order, ready = await api.post("/orders", json=LINE), await api.get("/readyz")
        return (order.status_code, ready.status_code) == statuses

    await wait_until(seen, AMPLE_SECONDS, f"{statuses} for an order and for readiness")


async def test_sessions_on_a_demoted_server_are_dropped(pair: Pair) -> None:
    """The address leads to the new primary, but open sessions stay on the old one, now read-only."""
    primary, standby = pair
    async with Proxy("127.0.0.1", primary.port, frames=postgres) as proxy, serving(proxy.url(primary.url)) as api:
        await becomes(api, 201, 200)
        async with asyncio.TaskGroup() as group:  # several sessions
            for _ in range(5):
                group.create_task(api.post("/orders", json=LINE))
        await fetchval(primary.url, "ALTER SYSTEM SET default_transaction_read_only = on")
        await fetchval(primary.url, "SELECT pg_reload_conf()")
        await becomes(api, 503, 503)
        assert_problem(await api.post("/orders", json=LINE), 503, "database-unavailable")
        await standby.promote()
        proxy.redirect("127.0.0.1", standby.port)
        await becomes(api, 201, 200)


async def test_reads_leave_a_demoted_server_too(pair: Pair) -> None:
    """A process that only reads notices by its readiness check, and then reads from the new primary."""
    primary, standby = pair
    async with Proxy("127.0.0.1", primary.port, frames=postgres) as proxy, serving(proxy.url(primary.url)) as api:
        await becomes(api, 201, 200)
        path = (await api.post("/orders", json=LINE)).headers["location"]
        await standby.catch_up(primary)
        await fetchval(primary.url, "ALTER SYSTEM SET default_transaction_read_only = on")
        await fetchval(primary.url, "SELECT pg_reload_conf()")
        await standby.promote()
        proxy.redirect("127.0.0.1", standby.port)
        await fetchval(standby.url, "UPDATE orders SET status = 'cancelled' RETURNING true")

        async def read() -> bool:
            await api.get("/readyz")
            return bool((await api.get(path)).json().get("status") == "cancelled")

        await wait_until(read, AMPLE_SECONDS, "the order as the new primary has it")


async def test_readiness_recovers_over_a_long_link(database_url: str) -> None:
    """A check that takes longer than its probe waits continues, and its session serves the next probe."""
    limits = {"database_pool_wait_seconds": 1, "database_statement_seconds": 5}
    parts = urlsplit(database_url)
    async with (
        Proxy(parts.hostname or "", parts.port or 5432, frames=postgres) as proxy,
        serving(proxy.url(database_url), **limits) as api,
    ):
        await becomes(api, 201, 200)
        proxy.arm(Delay(0.15))
        proxy.cut()
        await becomes(api, 201, 200)


async def test_a_url_of_two_hosts_leads_to_the_primary(pair: Pair) -> None:
    """Also if the standby is named first, and if the primary stops answering and the standby is promoted."""
    primary, standby = pair
    async with patient_pool(either(standby, primary), 1) as pool, db.connection(pool) as conn:
        assert await conn.fetchval("SELECT inet_server_port()") == primary.port
    impatient = {"database_statement_seconds": 1, "database_pool_wait_seconds": 1}
    async with serving(either(primary, standby), **impatient) as api:
        await becomes(api, 201, 200)
        primary.freeze()
        await becomes(api, 503, 503)
        await standby.promote()
        await becomes(api, 201, 200)


async def test_a_server_in_recovery_is_unavailable(pair: Pair) -> None:
    """A server in recovery raises DatabaseUnavailable."""
    _, standby = pair
    with pytest.raises(DatabaseUnavailable, match="in recovery"):
        await db.check(standby.url)
    async with patient_pool(standby.url, 1) as pool:
        with pytest.raises(DatabaseUnavailable, match="in recovery"):
            async with db.connection(pool):
                pytest.fail("a session in recovery was lent")

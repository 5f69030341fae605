"""The cost of probes: one check a second for all of them, over connections reserved for that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx

from app.bootstrap import PROBE_POOL_SIZE
from app.db import Pool
from chaos.proxy.faults import Refuse
from chaos.proxy.proxy import Proxy
from tests.harness.api import serving
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
PROBES = 30
LOOKED = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
      AND (query LIKE '%alembic_version%' OR query LIKE '%FROM sagas s JOIN orders%')
"""
WAITS_FOR = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'
"""


@contextlib.asynccontextmanager
async def locked(pool: Pool, table: str) -> AsyncIterator[None]:
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(f"LOCK TABLE {table}")
        yield


async def ask(api: httpx.AsyncClient, *paths: str) -> list[httpx.Response]:
    """Request each path many times at once."""
    return await asyncio.gather(*(api.get(path) for path in paths * PROBES))


async def test_probes_share_few_connections(api: httpx.AsyncClient, pool: Pool) -> None:
    """Many probes at a time use few database connections."""
    answers = await ask(api, "/readyz", "/metrics")
    assert {answer.status_code for answer in answers} == {200}
    assert 0 < await pool.fetchval(LOOKED) <= PROBE_POOL_SIZE


async def test_readiness_waits_for_no_request(database_url: str, pool: Pool) -> None:
    """Requests that use every connection do not delay `/readyz`."""
    async with serving(database_url, database_pool_size=1) as api:
        async with locked(pool, "orders"):
            placing = asyncio.create_task(api.post("/orders", json=LINE))
            await wait_until(lambda: pool.fetchval(WAITS_FOR, "orders"), AMPLE_SECONDS, "a request under way")
            assert (await api.get("/readyz")).status_code == 200
        assert (await placing).status_code == 201


async def test_a_hanging_count_is_not_started_twice(api: httpx.AsyncClient, pool: Pool) -> None:
    """Further callers wait for the running count."""
    async with locked(pool, "sagas"):
        asking = asyncio.create_task(ask(api, "/metrics"))
        await wait_until(lambda: pool.fetchval(WAITS_FOR, "FROM sagas s"), AMPLE_SECONDS, "a count")
        assert {answer.status_code for answer in await asking} == {200}
        assert await pool.fetchval(WAITS_FOR, "FROM sagas s") <= 1


async def test_readiness_opens_no_connection_to_the_broker(
    database_url: str, pool: Pool, broker_proxy: Proxy, rabbitmq_url: str
) -> None:
    """It uses the connection that the process has."""
    async with serving(database_url, roles="relay", rabbitmq_url=broker_proxy.url(rabbitmq_url)) as process:

        async def says(postgres: str) -> bool:
            rows = {row["name"]: row["status"] for row in (await process.get("/readyz")).json()["checks"]}
            return (rows["postgres"], rows["rabbitmq"]) == (postgres, "ok")

        await wait_until(lambda: says("ok"), AMPLE_SECONDS, "readiness")
        broker_proxy.arm(Refuse())
        await pool.execute("DELETE FROM alembic_version")  # shows which check came after the broker started to refuse
        await wait_until(lambda: says("down"), AMPLE_SECONDS, "a look while the broker refuses")

"""Faults of the pair of Postgres servers: the primary is lost for good, or the standby for a while.

The promise: an acknowledged order is on both servers, so it survives either. A COMMIT that the standby does not confirm
is not answered; a session that ends meanwhile leaves rows that only the primary has, and that others can read.
"""

import asyncio
import random

from chaos.proxy.proxy import HOST
from chaos.runner.faults.acts import Row
from chaos.runner.reach import COMMITS_WAITED, ORDERS_LOST
from chaos.runner.system import System
from tests.harness.standby import fetchval

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
ORDERS = "SELECT coalesce(string_agg(id::text, ' '), '') FROM orders"
END_WAITS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
ROUND_SECONDS = 0.5


async def _fail_over(system: System, _: random.Random, seconds: float) -> None:
    """Lose the primary for good, and use the standby after `seconds`. A new standby follows."""
    await system.postgres.kill()
    await asyncio.sleep(seconds)
    await _promote(system)


async def _kill_standby(system: System, _: random.Random, seconds: float) -> None:
    """Let commits wait while the standby is down."""
    await system.postgres.standby.kill()
    await _let_commits_wait(system, seconds)
    await system.postgres.standby.start()


async def _freeze_standby(system: System, _: random.Random, seconds: float) -> None:
    """Let commits wait while the standby is silent."""
    system.postgres.standby.freeze()
    try:
        await _let_commits_wait(system, seconds)
    finally:
        system.postgres.standby.thaw()


async def _lose_unconfirmed(system: System, _: random.Random, seconds: float) -> None:
    """End sessions that wait for a dead standby, so that their rows are visible; then lose these rows in a failover."""
    primary = system.postgres.primary
    await system.postgres.standby.kill()
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        await asyncio.sleep(ROUND_SECONDS)
        await fetchval(primary.url, END_WAITS)
    had = await _orders(primary.url)
    await system.postgres.kill()
    await system.postgres.standby.start()
    await _promote(system)
    system.met[ORDERS_LOST] += len(had - await _orders(system.postgres.url))


async def _promote(system: System) -> None:
    await system.postgres.fail_over()
    system.postgres_link.redirect(HOST, system.postgres.port)
    await system.postgres.add_standby()


async def _let_commits_wait(system: System, seconds: float) -> None:
    await asyncio.sleep(seconds)
    system.met[COMMITS_WAITED] += int(str(await fetchval(system.postgres.primary.url, WAITING)))


async def _orders(url: str) -> set[str]:
    return set(str(await fetchval(url, ORDERS)).split())


FAULTS: dict[str, Row] = {
    "postgres: failover to the standby": Row("postgres", (0.0, 2.0), _fail_over),
    "postgres: failover without the last rows": Row("postgres", (2.0, 5.0), _lose_unconfirmed),
    "standby: kill -9": Row("postgres", (3.0, 8.0), _kill_standby),
    "standby: freeze": Row("postgres", (1.0, 8.0), _freeze_standby),
}

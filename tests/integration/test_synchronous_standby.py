"""A synchronous standby: an order that the standby does not have yet is not acknowledged, whatever times out."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from app import db
from app.db_session import connect
from app.errors import ConfigurationError, DatabaseUnavailable
from app.idempotency import store, transaction
from app.idempotency.key import IdempotencyKey
from app.idempotency.store import StoredResponse
from tests.harness.api import serving
from tests.harness.installed import Postgres
from tests.harness.standby import fetchval, require_standby
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
UNKNOWN = (503, 409)  # 409: an earlier attempt still waits for the standby, and holds the key
KEY = IdempotencyKey("default", "key", b"fingerprint", 1)
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
END_WAITS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def test_a_late_standby_cancels_no_commit(server_directory: Path) -> None:
    """A COMMIT that waits for the standby for too long is never cancelled: that would report success without it.

    The session is terminated instead. Postgres goes on waiting, and no other session sees the rows before the standby
    has them.
    """
    async with Postgres(server_directory) as postgres:
        await fetchval(postgres.url, "CREATE TABLE rows (id int PRIMARY KEY)")
        await require_standby(postgres, "absent")
        async with db.open_pool(postgres.url, 2, command_seconds=0.5) as pool:
            with pytest.raises(DatabaseUnavailable):
                async with db.transaction(pool) as conn:
                    await conn.execute("INSERT INTO rows VALUES (1)")
            with pytest.raises(DatabaseUnavailable):  # the index makes the next attempt wait, too
                async with db.transaction(pool, lock_seconds=0.2) as conn:
                    await conn.execute("INSERT INTO rows VALUES (1)")
            assert await fetchval(postgres.url, WAITING) == 1
            assert await fetchval(postgres.url, "SELECT count(*) FROM rows") == 0
            await require_standby(postgres, "")
            with pytest.raises(asyncpg.UniqueViolationError):
                async with db.transaction(pool) as conn:
                    await conn.execute("INSERT INTO rows VALUES (1)")


async def test_commits_that_ignore_the_standby_are_refused(server_directory: Path) -> None:
    """`synchronous_commit = local` is refused if there is a synchronous standby, with the setting to change."""
    async with Postgres(server_directory) as postgres:
        await fetchval(postgres.url, "ALTER SYSTEM SET synchronous_commit = 'local'")
        await fetchval(postgres.url, "SELECT pg_reload_conf()")
        await require_standby(postgres, "")
        await (await connect(postgres.url)).close()
        await require_standby(postgres, "absent")
        with pytest.raises(ConfigurationError, match=r"synchronous_commit is local there.*set it to on"):
            await connect(postgres.url)


@pytest.fixture
async def migrated(server_directory: Path) -> AsyncIterator[Postgres]:
    async with Postgres(server_directory) as postgres:
        await asyncio.to_thread(db.migrate, postgres.url)
        yield postgres


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "key"}], ids=["without a key", "with a key"])
async def test_the_second_attempt_waits_for_the_standby_too(migrated: Postgres, headers: dict[str, str]) -> None:
    """A session that ends while its COMMIT waits leaves rows that only the primary has: they are no proof."""
    async with serving(migrated.url, database_statement_seconds=1, idempotency_wait_seconds=1) as api:
        await require_standby(migrated, "absent")
        request = asyncio.create_task(api.post("/orders", json=LINE, headers=headers))
        await wait_until(lambda: fetchval(migrated.url, END_WAITS), AMPLE_SECONDS, "a COMMIT that waits")
        assert (await request).status_code in UNKNOWN
        assert await fetchval(migrated.url, "SELECT count(*) FROM orders") == 1
        if headers:
            assert (await api.post("/orders", json=LINE, headers=headers)).status_code in UNKNOWN
        await require_standby(migrated, "")
        assert (await api.post("/orders", json=LINE, headers=headers)).status_code == 201
        assert await fetchval(migrated.url, "SELECT count(*) FROM orders") == (1 if headers else 2)


async def test_a_replay_while_the_outbox_is_full_waits_for_the_standby(migrated: Postgres) -> None:
    """It writes no order, and its response must still be on the standby."""
    async with db.open_pool(migrated.url, 2, command_seconds=0.5) as pool:
        async with db.transaction(pool) as conn:
            await store.acquire(conn, KEY, StoredResponse(201, "/orders/1", b"{}"), 60, 1)
        await require_standby(migrated, "absent")
        with pytest.raises(DatabaseUnavailable):
            await transaction.replay(pool, KEY)
        await require_standby(migrated, "")
        replayed = await transaction.replay(pool, KEY)
        assert replayed is not None
        assert replayed.body == b"{}"

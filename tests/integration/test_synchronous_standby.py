"""A synchronous standby: an order that the standby does not have yet is not acknowledged, whatever times out."""

from pathlib import Path

import asyncpg
import pytest

from app import db
from app.db_session import connect
from app.errors import ConfigurationError, DatabaseUnavailable
from tests.harness.installed import Postgres
from tests.harness.standby import fetchval
from tests.harness.wait import AMPLE_SECONDS, wait_until

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def require_standby(postgres: Postgres, name: str) -> None:
    """Let every commit wait for the standby of this name; empty: for none, which also ends the waits."""
    await fetchval(postgres.url, f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await fetchval(postgres.url, "SELECT pg_reload_conf()")

    async def is_set() -> bool:
        return await fetchval(postgres.url, "SELECT current_setting('synchronous_standby_names')") == name

    await wait_until(is_set, AMPLE_SECONDS, "reload of the settings")


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

"""The schema: migrations match the metadata, can be undone, and may run in several processes at once."""

import asyncio
import os
import sys
from collections.abc import Callable

import asyncpg
import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app import db
from app.errors import ConfigurationError, DatabaseUnavailable
from app.messaging import inbox, outbox, transport_lease
from app.operations import audit
from app.orders import tables
from app.saga import pauses, store
from tests.harness.processes import REPOSITORY
from tests.harness.wait import wait_until

DESCRIBED_BY = (outbox, inbox, tables, store, pauses, audit, transport_lease)  # importing them fills db.metadata
SCRIPTS = ScriptDirectory(REPOSITORY / "migrations")
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()]  # newest first


async def execute(url: str, statement: str) -> None:
    conn = await asyncpg.connect(url)
    await conn.execute(statement)
    await conn.close()


async def revision(url: str) -> str | None:
    return await db.inspect(url)


async def differences(url: str) -> list[object]:
    """Return the changes that Alembic would make to match the metadata."""

    def compare(connection: sqlalchemy.Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, db.metadata))

    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://", 1), poolclass=NullPool)
    async with engine.connect() as connection:
        return await connection.run_sync(compare)


async def alembic(act: Callable[[Config, str], None], url: str, target: str) -> None:
    """Run an Alembic command, in a thread: it starts an event loop of its own."""
    config = Config()
    config.set_main_option("script_location", str(REPOSITORY / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    await asyncio.to_thread(act, config, target)


@pytest.fixture
async def empty_url(database_url: str) -> str:
    """A database that was never migrated."""
    await execute(database_url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return database_url


async def test_the_migrations_match_the_metadata(database_url: str) -> None:
    """The migrations create exactly the tables that the code describes."""
    assert db.metadata.tables
    assert await differences(database_url) == []


async def test_a_difference_to_the_metadata_is_detected(database_url: str) -> None:
    """The comparison detects a difference between migrations and code."""
    await execute(database_url, "ALTER TABLE outbox ALTER attempts TYPE bigint; DROP INDEX saga_steps_saga_id_idx")
    assert len(await differences(database_url)) == 2


async def test_every_migration_can_be_undone_and_redone(database_url: str) -> None:
    """Every migration can be undone and applied again."""
    for _ in REVISIONS:
        await alembic(command.downgrade, database_url, "-1")
    assert await revision(database_url) is None
    for _ in REVISIONS:
        await alembic(command.upgrade, database_url, "+1")
    assert await revision(database_url) == REVISIONS[0]
    assert await differences(database_url) == []


async def test_migrating_a_current_schema_changes_nothing(database_url: str) -> None:
    """Migrating a current schema changes nothing."""
    await asyncio.to_thread(db.migrate, database_url)
    assert await revision(database_url) == REVISIONS[0]


async def test_several_processes_may_migrate_at_once(empty_url: str) -> None:
    """Several processes may migrate one database at once, and none waits for a snapshot of another that waits."""

    async def all_wait() -> bool:
        query = (
            "SELECT count(*) = 3 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return await witness.fetchval(query) is True

    env = {**os.environ, "ORDERS_DATABASE_URL": empty_url}
    arguments = (sys.executable, "-m", "app", "migrate")
    witness, holder = await asyncpg.connect(empty_url), await asyncpg.connect(empty_url)
    async with holder.transaction():
        await holder.execute("CREATE TABLE alembic_version ()")  # another migration waits before it creates the table
        processes = [await asyncio.create_subprocess_exec(*arguments, cwd=REPOSITORY, env=env) for _ in range(3)]
        await wait_until(all_wait, 60, "three processes that wait")
        await holder.execute("DROP TABLE alembic_version")
    assert [await process.wait() for process in processes] == [0, 0, 0]
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert await witness.fetchval(deadlocks) == 0
    await asyncio.gather(witness.close(), holder.close())
    assert await revision(empty_url) == REVISIONS[0]
    assert await differences(empty_url) == []


async def test_a_waiting_migration_locks_no_other_table(database_url: str) -> None:
    """0004 changes sagas, 0005 orders: one transaction for both could deadlock with requests."""
    await alembic(command.downgrade, database_url, "0003")

    async def first_is_done() -> bool:
        return await revision(database_url) == "0004"

    conn = await asyncpg.connect(database_url)
    async with conn.transaction():
        await conn.execute("LOCK TABLE orders IN SHARE MODE")
        migrating = asyncio.create_task(asyncio.to_thread(db.migrate, database_url))
        await wait_until(first_is_done, 60, "the first of two migrations")
        await conn.execute("LOCK TABLE sagas IN ACCESS EXCLUSIVE MODE")
    await conn.close()
    await migrating
    assert await revision(database_url) == REVISIONS[0]


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
async def test_every_form_of_the_url_is_accepted(empty_url: str, scheme: str) -> None:
    """Every accepted form of the URL can be migrated and inspected."""
    url = f"{scheme}://{empty_url.partition('://')[2]}"
    await asyncio.to_thread(db.migrate, url)
    assert await revision(url) == REVISIONS[0]


@pytest.mark.parametrize("older", [None, *REVISIONS[1:]])
def test_a_database_that_lacks_a_migration_is_behind(older: str | None) -> None:
    """A database that lacks a migration of this release is behind."""
    assert db.is_behind(older)


@pytest.mark.parametrize("present", [REVISIONS[0], "9999"])
def test_a_current_or_newer_database_is_not_behind(present: str) -> None:
    """A current database, or one of a newer release, is not behind."""
    assert not db.is_behind(present)


async def test_a_current_durable_database_is_accepted(database_url: str) -> None:
    """`check` accepts a current database with synchronous commits."""
    await db.check(database_url)


async def test_a_database_of_a_newer_release_is_accepted(database_url: str) -> None:
    """`check` accepts a database of a newer release."""
    await execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    await db.check(database_url)


async def test_an_unmigrated_database_is_refused(empty_url: str) -> None:
    """`check` refuses a database that was not migrated."""
    assert await revision(empty_url) is None
    with pytest.raises(ConfigurationError, match="orders migrate"):
        await db.check(empty_url)


async def test_a_database_that_may_lose_commits_is_refused(database_url: str) -> None:
    """`check` refuses a database without synchronous commits."""
    name = database_url.rpartition("/")[2]
    await execute(database_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    with pytest.raises(ConfigurationError, match="ORDERS_DATABASE_URL: synchronous_commit is off"):
        await db.check(database_url)


@pytest.mark.parametrize("change", [{"port": "1"}, {"username": "stranger"}, {"database": "nowhere"}])
async def test_an_unreachable_database_is_unavailable(database_url: str, change: dict[str, str]) -> None:
    """An unreachable database raises DatabaseUnavailable, not ConfigurationError."""
    parts = sqlalchemy.make_url(database_url).set(**change)  # type: ignore[arg-type]
    with pytest.raises(DatabaseUnavailable):
        await db.check(parts.render_as_string(hide_password=False))

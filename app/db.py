"""Postgres: the schema's metadata, connection pools that fail fast, transactions, migrations.

Hot writes are hand-written SQL on asyncpg; SQLAlchemy describes the schema, so that a test can hold the migrations to
it. Whatever says that Postgres is out, slow or full leaves this module as DatabaseUnavailable.
"""

import asyncio
import contextlib
import functools
import re
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError

from app.errors import ConfigurationError, DatabaseUnavailable

Connection = asyncpg.Connection | PoolConnectionProxy

CONNECT_SECONDS = 5.0
POOL_WAIT_SECONDS = 5.0  # where nobody waits for an answer; requests have a setting
MIGRATION_TRIES, MIGRATION_PAUSE_SECONDS = 20, 1.0  # each waits 2 s for a lock (migrations/env.py)
COME_AGAIN = {asyncpg.LockNotAvailableError.sqlstate, asyncpg.DeadlockDetectedError.sqlstate}
COMMAND_TIMEOUT_SECONDS = 5.0  # no statement of ours takes a second; a server that does not answer is out

MIGRATIONS = Path(__file__).parent.parent / "migrations"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

UNAVAILABLE = (
    OSError,  # no connection; includes TimeoutError: no free connection, or no answer in time
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.InsufficientResourcesError,  # class 53: out of connections, memory or disk
    asyncpg.OperatorInterventionError,  # class 57: shutting down, starting up, terminated by an operator
    asyncpg.InvalidAuthorizationSpecificationError,  # class 28
    asyncpg.InvalidCatalogNameError,  # class 3D
    asyncpg.LockNotAvailableError,  # lock_timeout: somebody keeps a row for too long
    asyncpg.ReadOnlySQLTransactionError,  # connected to a standby, as after a failover
    asyncpg.InterfaceError,  # the connection is already closed
)


def plain_url(url: str) -> str:
    """Turn any of the accepted spellings into the one that asyncpg reads; SQLAlchemy's `ssl` is libpq's `sslmode`."""
    spelling, plain = "postgresql+asyncpg://", "postgresql://"
    return re.sub(r"([?&])ssl=", r"\1sslmode=", url).replace(spelling, plain, 1) if url.startswith(spelling) else url


class Pool(asyncpg.Pool):
    """Connections, and how long a caller waits for a free one unless it says otherwise."""

    def __init__(
        self,
        url: str,
        size: int,
        command_seconds: float,
        wait_seconds: float,
        connection_class: type[asyncpg.Connection],
    ) -> None:
        super().__init__(
            plain_url(url),
            min_size=0,
            max_size=size,
            max_queries=50_000,  # this and the next: asyncpg's defaults
            max_inactive_connection_lifetime=300.0,
            connection_class=connection_class,
            record_class=asyncpg.Record,
            loop=None,
            timeout=max(wait_seconds, CONNECT_SECONDS),
            command_timeout=command_seconds,
            init=_require_durability,
            reset=_leave_no_transaction,
            server_settings={
                "application_name": "orders",
                "jit": "off",  # no statement of ours runs as long as compiling it takes, whatever the planner believes
                # A process that froze inside a transaction must not hold its locks for long: sagas have leases of 30 s.
                "idle_in_transaction_session_timeout": "10s",
            },
        )
        self.wait_seconds = wait_seconds


@contextlib.asynccontextmanager
async def open_pool(
    url: str,
    size: int,
    command_seconds: float = COMMAND_TIMEOUT_SECONDS,
    wait_seconds: float = POOL_WAIT_SECONDS,
    connection_class: type[asyncpg.Connection] = asyncpg.Connection,
) -> AsyncIterator[Pool]:
    """Lend a pool of up to `size` connections; connects when first used, so Postgres may still be on its way up."""
    pool = Pool(url, size, command_seconds, wait_seconds, connection_class)
    await pool
    try:
        yield pool
    finally:
        pool.terminate()  # not close: nobody uses it any more, and a silent server must not hold an exit up


async def _require_durability(conn: Connection) -> None:
    """Refuse a connection whose commits could be lost after they were acknowledged: no 201 may rest on one."""
    if await conn.fetchval("SELECT current_setting('synchronous_commit')") == "off":
        raise DatabaseUnavailable("postgres: synchronous_commit is off")


async def _leave_no_transaction(conn: Connection) -> None:
    """Make a returned connection fit for its next user; asyncpg's own way costs a round trip each time.

    It would end what nothing here begins: cursors, listening, session settings, session locks.
    """
    if conn.is_in_transaction():
        raise AssertionError("bug: a connection was given back inside a transaction")


@contextlib.asynccontextmanager
async def connection(pool: Pool, wait_seconds: float | None = None) -> AsyncIterator[Connection]:
    """Lend one connection. Raises DatabaseUnavailable when none is to be had within `wait_seconds` (the pool's)."""
    try:
        conn = await pool.acquire(timeout=pool.wait_seconds if wait_seconds is None else wait_seconds)
        try:
            yield conn
        except (TimeoutError, asyncio.CancelledError):
            # What was being asked may still be under way, and so may its cancellation: nobody must inherit them.
            conn.terminate()
            raise
        except asyncpg.PostgresError as error:
            _withhold_values(error)
            raise
        finally:
            await pool.release(conn)
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(f"postgres: {type(error).__name__}: {error}".strip(": ")) from error


def _withhold_values(error: asyncpg.PostgresError) -> None:
    """Remove from an error what it quotes of a row, since its text goes to logs, inbox rows and dead letters.

    DETAIL quotes rows: addresses, payment tokens. Messages of class 22 (data exceptions), and asyncpg's own of that
    class, quote single values; no other class does.
    """
    error.detail = None
    if isinstance(error, asyncpg.DataError):
        error.args = ("its message is withheld, since it quotes a value",)


@contextlib.asynccontextmanager
async def transaction(
    pool: Pool, wait_seconds: float | None = None, lock_seconds: float | None = None
) -> AsyncIterator[Connection]:
    """Lend one connection inside a READ COMMITTED transaction, committed on leaving without an error.

    With `lock_seconds`, waiting longer than that for a lock raises asyncpg.LockNotAvailableError (55P03).
    """
    milliseconds = None if lock_seconds is None else max(1, round(lock_seconds * 1000))
    async with connection(pool, wait_seconds) as conn:
        await conn.execute("BEGIN" if milliseconds is None else f"BEGIN; SET LOCAL lock_timeout = {milliseconds}")
        try:
            yield conn
        except (TimeoutError, asyncio.CancelledError):
            raise  # a server that does not answer would not answer a ROLLBACK either: the connection goes instead
        except BaseException:
            await conn.execute("ROLLBACK")
            raise
        if (answer := await conn.execute("COMMIT")) != "COMMIT":
            raise AssertionError(f"bug: an error inside the transaction was swallowed, so COMMIT did a {answer}")


def first_id(seconds_ago: float) -> uuid.UUID:
    """Return the lowest UUIDv7 of that time: ids are ordered by time, so a primary key finds the old rows by itself."""
    return uuid.UUID(int=int((time.time() - seconds_ago) * 1000) << 80)  # RFC 9562, section 5.7


async def inspect(url: str) -> tuple[str, str | None]:
    """Return the server's synchronous_commit and the schema's revision. Raises DatabaseUnavailable."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            conn = await asyncpg.connect(plain_url(url))
            try:
                return await conn.fetchval("SELECT current_setting('synchronous_commit')"), await revision(conn)
            finally:
                conn.terminate()  # not close: that waits for the server, which has answered
    except asyncpg.ClientConfigurationError as error:  # an InterfaceError, but no outage
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(f"postgres: {type(error).__name__}: {error}".strip(": ")) from error
    except asyncpg.PostgresError as error:  # reached, and it refused: a parameter that it does not know, no rights
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error


async def check(url: str) -> None:
    """Refuse what the service must not run on: commits that are not durable, a schema that is behind.

    Raises ConfigurationError, or DatabaseUnavailable when Postgres cannot be asked.
    """
    durability, present = await inspect(url)
    if durability == "off":
        raise ConfigurationError(
            "ORDERS_DATABASE_URL: synchronous_commit is off there, so an acknowledged order could be lost; "
            "set it to on (or local, remote_write, remote_apply)"
        )
    if is_behind(present):
        raise ConfigurationError("the database schema is behind this release: run `orders migrate`")


async def revision(conn: Connection) -> str | None:
    """Return the schema's Alembic revision, None where there is none."""
    if await conn.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    found: str | None = await conn.fetchval("SELECT version_num FROM alembic_version")
    return found


def affected(status: str) -> int:
    """Return the number of rows in the status of a statement, such as `UPDATE 3`."""
    return int(status.rpartition(" ")[2])


def is_behind(present: str | None) -> bool:
    """Tell whether the schema lacks a migration of this release. A revision it does not know is a newer one: fine."""
    if present is None:
        return True
    return present in _revisions()[1:]


@functools.cache
def _revisions() -> list[str]:
    """Return the revisions of this release, the newest first: the names of their files begin with them."""
    return sorted((path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("*_*.py")), reverse=True)


def migrate(url: str) -> None:
    """Bring the schema to this release's. Safe to run from several processes at once; blocks, so not in a loop.

    Raises DatabaseUnavailable when others keep a table locked all the time.
    """
    # Half a second of imports (templates, colours) that no other command should pay for.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    for _ in range(MIGRATION_TRIES):
        try:
            return command.upgrade(config, "head")
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in COME_AGAIN:
                raise
            time.sleep(MIGRATION_PAUSE_SECONDS)
    raise DatabaseUnavailable("somebody keeps a table locked (a vacuum, a backup?): not all is migrated, try again")

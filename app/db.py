"""Postgres: the schema's metadata, connection pools that fail fast, transactions, migrations.

Queries are hand-written SQL on asyncpg. SQLAlchemy describes the schema, so a test can compare the migrations with it.
Every error that means "Postgres is down, slow, full or read-only" leaves this module as DatabaseUnavailable.
"""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError

from app.db_session import UNAVAILABLE, connect, errors_of_opening, open_seconds, unavailable
from app.errors import ConfigurationError, DatabaseUnavailable, LocksTaken

Connection = asyncpg.Connection | PoolConnectionProxy
Opening = asyncio.Task[asyncpg.Connection]

IDLE_SECONDS = 300.0  # after which an idle connection is closed; asyncpg's default
POOL_WAIT_SECONDS = 5.0  # for background work; requests have a setting
MIGRATION_TRIES, MIGRATION_PAUSE_SECONDS = 20, 1.0  # each try waits 2 s for a lock (migrations/env.py)
# A batch waits at most this long for all its locks, so that their owners cannot delay its other rows. `lock_timeout` is
# for one lock, and at least 1 ms, so a batch must not be larger.
BATCH_LOCKS_SECONDS = 0.05
BATCH_SIZE = 50
COMMAND_TIMEOUT_SECONDS = 5.0  # our statements take less than a second; a server that does not answer is down

MIGRATING_ROLE = "migrate as a role that owns the tables and has USAGE and CREATE on their schema"
MIGRATIONS = Path(__file__).parent.parent / "migrations"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


class Pool(asyncpg.Pool):
    """A pool of connections. `wait_seconds`: how long a caller waits for a free one by default.

    Each connection is opened in a task. When its waiter leaves, the task continues and serves the next waiter.
    Otherwise, a connection that takes longer to open than callers wait would never be opened.
    """

    def __init__(
        self,
        url: str,
        size: int,
        command_seconds: float,
        wait_seconds: float,
        connection_class: type[asyncpg.Connection],
    ) -> None:
        super().__init__(
            url,
            min_size=0,
            max_size=size,
            max_queries=50_000,  # asyncpg's default
            max_inactive_connection_lifetime=IDLE_SECONDS,
            connection_class=connection_class,
            record_class=asyncpg.Record,
            loop=None,
            connect=self._open_or_take_over,
            command_timeout=command_seconds,
            reset=_check_no_transaction,
        )
        self.wait_seconds = wait_seconds
        self.siblings: tuple[Pool, ...] = (self,)  # the pools of this process on the same server
        self._openings: set[Opening] = set()  # connections that the pool does not have yet
        self._abandoned: list[Opening] = []  # openings without a waiter, oldest first

    async def _open_or_take_over(self, *url: Any, **options: Any) -> asyncpg.Connection:
        """Open a connection, or take over an abandoned opening, so that there are never more than the pool's size."""
        opening = self._take_over() or asyncio.create_task(self._open(*url, **options))
        self._openings.add(opening)
        try:
            await asyncio.wait([opening])
        except asyncio.CancelledError:
            self._abandon(opening)
            raise
        self._openings.discard(opening)
        if opening.cancelled():
            raise asyncpg.InterfaceError("the pool has ended")
        return opening.result()

    async def _open(self, url: str, **options: Any) -> asyncpg.Connection:
        try:
            return await connect(url, max(self.wait_seconds, open_seconds(url)), **options)
        except ConfigurationError as error:  # a running process continues once the operator has fixed it
            raise DatabaseUnavailable(str(error)) from error

    def _abandon(self, opening: Opening) -> None:
        """Keep an opening for the next waiter, for as long as the pool keeps an idle connection."""
        self._abandoned.append(opening)
        asyncio.get_running_loop().call_later(0 if self.is_closing() else IDLE_SECONDS, self._drop, opening)

    def _take_over(self) -> Opening | None:
        while self._abandoned:
            opening = self._abandoned.pop(0)
            if not opening.done() or _is_open(opening):
                return opening
            self._openings.discard(opening)
        return None

    def _drop(self, opening: Opening) -> None:
        if opening in self._abandoned:
            self._abandoned.remove(opening)
            self._openings.discard(opening)
            _discard(opening)

    async def expire_connections(self) -> None:
        """Never lend the present connections again."""
        await super().expire_connections()
        for opening in tuple(self._abandoned):
            self._drop(opening)

    async def end(self) -> None:
        """Terminate every connection, also those that are being opened.

        asyncpg's `close` would wait for the server, and a silent server must not delay the exit.
        """
        self.terminate()
        for opening in self._openings:
            _discard(opening)
        await asyncio.gather(*self._openings, return_exceptions=True)


def _is_open(opening: Opening) -> bool:
    """Return whether a finished opening led to a connection that is still open."""
    return not opening.cancelled() and opening.exception() is None and not opening.result().is_closed()


def _discard(opening: Opening) -> None:
    if not opening.cancel() and _is_open(opening):
        opening.result().terminate()


@contextlib.asynccontextmanager
async def open_pool(
    url: str,
    size: int,
    command_seconds: float = COMMAND_TIMEOUT_SECONDS,
    wait_seconds: float = POOL_WAIT_SECONDS,
    connection_class: type[asyncpg.Connection] = asyncpg.Connection,
) -> AsyncIterator[Pool]:
    """Open a pool of up to `size` connections. It connects at its first use, so Postgres may still be starting."""
    pool = Pool(url, size, command_seconds, wait_seconds, connection_class)
    await pool
    try:
        yield pool
    finally:
        await pool.end()


def join_pools(*pools: Pool) -> None:
    """Link pools on one server: when one of them finds the server demoted, all of them drop their connections."""
    for pool in pools:
        pool.siblings = pools


async def _check_no_transaction(conn: Connection) -> None:
    """Check a returned connection. asyncpg's own reset would cost a round trip each time.

    That reset ends cursors, listening, session settings and session locks, which this service does not use.
    """
    if conn.is_in_transaction():
        raise AssertionError("bug: a connection was returned inside a transaction")


@contextlib.asynccontextmanager
async def connection(pool: Pool, wait_seconds: float | None = None) -> AsyncIterator[Connection]:
    """Lend one connection. Raises DatabaseUnavailable when none is available within `wait_seconds` (the pool's)."""
    try:
        conn = await pool.acquire(timeout=pool.wait_seconds if wait_seconds is None else wait_seconds)
        try:
            yield conn
        except (TimeoutError, asyncio.CancelledError, asyncpg.InternalClientError):
            # The statement, or its cancellation, may still be running, or the connection is in no usable state: no
            # other caller may get it.
            conn.terminate()
            raise
        except asyncpg.ReadOnlySQLTransactionError:
            # The server was demoted, and every session of this process is on it: never lend them again.
            conn.terminate()
            for sibling in pool.siblings:
                await sibling.expire_connections()
            raise
        except asyncpg.PostgresError as error:
            _withhold_values(error)
            raise
        finally:
            await pool.release(conn)
    except UNAVAILABLE as error:
        raise unavailable(error) from error


def _withhold_values(error: asyncpg.PostgresError) -> None:
    """Remove quoted row values from an error, because its text goes to logs, inbox rows and dead letters.

    DETAIL quotes rows: addresses, payment tokens. Messages of class 22 (data exceptions), Postgres's and asyncpg's,
    quote single values; no other class does.
    """
    error.detail = None
    if isinstance(error, asyncpg.DataError):
        error.__cause__ = None  # it quotes the value too, if asyncpg could not encode it
        error.args = ("its message is withheld, because it quotes a value",)


@contextlib.asynccontextmanager
async def transaction(
    pool: Pool, wait_seconds: float | None = None, lock_seconds: float | None = None
) -> AsyncIterator[Connection]:
    """Lend one connection inside a READ COMMITTED transaction, which commits unless the block raises.

    With `lock_seconds`, waiting longer than that for a lock raises asyncpg.LockNotAvailableError (55P03).
    """
    milliseconds = None if lock_seconds is None else max(1, round(lock_seconds * 1000))
    async with connection(pool, wait_seconds) as conn:
        await conn.execute("BEGIN" if milliseconds is None else f"BEGIN; SET LOCAL lock_timeout = {milliseconds}")
        try:
            yield conn
        except (TimeoutError, asyncio.CancelledError, asyncpg.InternalClientError):
            raise  # a server that does not answer would not answer a ROLLBACK either: `connection` terminates it
        except BaseException:
            await conn.execute("ROLLBACK")
            raise
        if (answer := await conn.execute("COMMIT")) != "COMMIT":
            raise AssertionError(f"bug: an error inside the transaction was swallowed, so COMMIT returned {answer}")


@contextlib.asynccontextmanager
async def batch_transaction(pool: Pool, rows: int) -> AsyncIterator[Connection]:
    """Lend one connection in a transaction for a batch of `rows`. Raises LocksTaken when it would wait for a lock."""
    async with transaction(pool, lock_seconds=BATCH_LOCKS_SECONDS / rows) as conn:
        with giving_way():
            yield conn


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Raise LocksTaken when a statement of the block waits for a lock for longer than its `lock_timeout`."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise LocksTaken("another transaction holds a lock that this batch needs") from error


@contextlib.asynccontextmanager
async def snapshot(pool: Pool) -> AsyncIterator[Connection]:
    """Lend one connection whose statements all see the same committed rows. It cannot write."""
    async with transaction(pool) as conn:
        await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield conn


async def await_standby(conn: Connection) -> None:
    """Return when the synchronous standby, if there is one, has every row that this session can see.

    A COMMIT whose session ends while it waits for the standby leaves rows that are visible, and that a failover loses.
    A commit waits for everything before it. This one contains a message that no session reads: an empty one does not
    wait.
    """
    await conn.execute("SELECT pg_logical_emit_message(true, 'orders', '')")


async def now(conn: Connection) -> datetime:
    """Return the time on Postgres's clock. Ages and retention use only this clock: a process's clock may be wrong."""
    instant: datetime = await conn.fetchval("SELECT clock_timestamp()")
    return instant


def first_id(instant: datetime) -> uuid.UUID:
    """Return the lowest UUIDv7 of that time. Ids are ordered by time, so the primary key's index finds old rows."""
    return uuid.UUID(int=int(instant.timestamp() * 1000) << 80)  # RFC 9562, section 5.7


async def writable_revision(conn: Connection) -> str | None:
    """Return the schema's revision as `revision` does, in one round trip if there is one.

    Raises asyncpg.ReadOnlySQLTransactionError, as a write would, if the session's server was demoted.
    """
    query = "SELECT current_setting('transaction_read_only') = 'on' AS read_only, version_num FROM alembic_version"
    try:
        row = await conn.fetchrow(query)
    except asyncpg.UndefinedTableError:
        return None
    if row is not None and row["read_only"]:
        raise asyncpg.ReadOnlySQLTransactionError("the server is read-only or in recovery")
    return None if row is None else row["version_num"]


async def inspect(url: str) -> str | None:
    """Return the schema's revision, over a session like those of a pool. Raises what `connect` raises."""
    conn = await connect(url, command_timeout=COMMAND_TIMEOUT_SECONDS)
    try:
        with errors_of_opening():
            return await revision(conn)
    finally:
        conn.terminate()  # `close` would wait for the server


async def check(url: str) -> None:
    """Check that the service can run on this database: `connect` accepts it, and its schema is not behind.

    Raises ConfigurationError if not, DatabaseUnavailable when Postgres is unavailable.
    """
    if is_behind(await inspect(url)):
        raise ConfigurationError("the database schema is behind this release: run `orders migrate`")


async def revision(conn: Connection) -> str | None:
    """Return the schema's Alembic revision, None if it has none."""
    if await conn.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    found: str | None = await conn.fetchval("SELECT version_num FROM alembic_version")
    return found


def affected(status: str) -> int:
    """Return the number of rows in the status of a statement, such as `UPDATE 3`."""
    return int(status.rpartition(" ")[2])


def is_behind(present: str | None) -> bool:
    """Return whether the schema lacks a migration of this release. An unknown revision is a newer one: fine."""
    if present is None:
        return True
    return present in _revisions()[1:]


@functools.cache
def _revisions() -> list[str]:
    """Return the revisions of this release, newest first, from the names of their files."""
    return sorted((path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("*_*.py")), reverse=True)


def migrate(url: str) -> None:
    """Migrate the schema to this release. Several processes may do so at once. Blocks, so do not call in an event loop.

    Raises ConfigurationError when the role lacks a permission, DatabaseUnavailable when a table stays locked.
    """
    # These imports take half a second (templates, colours), which other commands should not pay for.
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
            _raise_unless_locked(error)
            time.sleep(MIGRATION_PAUSE_SECONDS)
    raise DatabaseUnavailable("a table stays locked (by a vacuum, a backup?): the migration is incomplete, try again")


def _raise_unless_locked(error: DBAPIError) -> None:
    """Return if a lock was the reason, so the migration can be retried; else raise what the error means."""
    match cause := error.orig and error.orig.__cause__:
        case asyncpg.LockNotAvailableError() | asyncpg.DeadlockDetectedError():
            return
        case asyncpg.InsufficientPrivilegeError():
            raise ConfigurationError(f"ORDERS_DATABASE_URL: {cause}: {MIGRATING_ROLE}") from error
        case BaseException() if isinstance(cause, UNAVAILABLE):
            raise unavailable(cause) from error
        case _:
            raise error

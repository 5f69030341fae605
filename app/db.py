"""Postgres: the schema's metadata, connection pools that fail fast, transactions, migrations.

Hot writes are hand-written SQL on asyncpg; SQLAlchemy describes the schema, so that a test can hold the migrations to
it. Whatever says that Postgres is out, slow, full or read-only leaves this module as DatabaseUnavailable.
"""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError

from app.db_session import UNAVAILABLE, connect, errors_of_opening, open_seconds, unavailable
from app.errors import ConfigurationError, DatabaseUnavailable

Connection = asyncpg.Connection | PoolConnectionProxy
Opening = asyncio.Task[asyncpg.Connection]

IDLE_SECONDS = 300.0  # an idle connection is closed after; asyncpg's default
POOL_WAIT_SECONDS = 5.0  # where nobody waits for an answer; requests have a setting
MIGRATION_TRIES, MIGRATION_PAUSE_SECONDS = 20, 1.0  # each waits 2 s for a lock (migrations/env.py)
COMMAND_TIMEOUT_SECONDS = 5.0  # no statement of ours takes a second; a server that does not answer is out

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
    """Connections, and how long a caller waits for a free one unless it says otherwise.

    Each connection is opened in a task, which goes on when its waiter has left, and serves the next one. Cancelled with
    its waiter, a connection that takes longer to open than callers wait would never be opened.
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
            reset=_leave_no_transaction,
        )
        self.wait_seconds = wait_seconds
        self.siblings: tuple[Pool, ...] = (self,)  # the pools of this process on the same server
        self._openings: set[Opening] = set()  # those whose connections the pool does not have yet
        self._left: list[Opening] = []  # those of them that have no waiter, the oldest first

    async def _open_or_take_over(self, *url: Any, **options: Any) -> asyncpg.Connection:
        """Open a connection. Where a waiter left an opening, take it over, so that there are no more than the size."""
        opening = self._take_over() or asyncio.create_task(self._open(*url, **options))
        self._openings.add(opening)
        try:
            await asyncio.wait([opening])
        except asyncio.CancelledError:
            self._leave(opening)
            raise
        self._openings.discard(opening)
        if opening.cancelled():
            raise asyncpg.InterfaceError("the pool has ended")
        return opening.result()

    async def _open(self, url: str, **options: Any) -> asyncpg.Connection:
        try:
            return await connect(url, max(self.wait_seconds, open_seconds(url)), **options)
        except ConfigurationError as error:  # a running process goes on when that is put right
            raise DatabaseUnavailable(str(error)) from error

    def _leave(self, opening: Opening) -> None:
        """Keep an opening for the next waiter, as long as the pool keeps an idle connection."""
        self._left.append(opening)
        asyncio.get_running_loop().call_later(0 if self.is_closing() else IDLE_SECONDS, self._give_up, opening)

    def _take_over(self) -> Opening | None:
        while self._left:
            opening = self._left.pop(0)
            if not opening.done() or _is_open(opening):
                return opening
            self._openings.discard(opening)
        return None

    def _give_up(self, opening: Opening) -> None:
        if opening in self._left:
            self._left.remove(opening)
            self._openings.discard(opening)
            _discard(opening)

    async def expire_connections(self) -> None:
        """Lend none of the connections again that were opened by now."""
        await super().expire_connections()
        for opening in tuple(self._left):
            self._give_up(opening)

    async def end(self) -> None:
        """Cut every connection, those that are being opened too.

        Not asyncpg's `close`: it waits for the server, and a silent one must not hold an exit up.
        """
        self.terminate()
        for opening in self._openings:
            _discard(opening)
        await asyncio.gather(*self._openings, return_exceptions=True)


def _is_open(opening: Opening) -> bool:
    """Tell whether an opening that is done has led to a connection that is still there."""
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
    """Lend a pool of up to `size` connections; connects when first used, so Postgres may still be on its way up."""
    pool = Pool(url, size, command_seconds, wait_seconds, connection_class)
    await pool
    try:
        yield pool
    finally:
        await pool.end()


def join_pools(*pools: Pool) -> None:
    """Let what one of these pools learns about the server count for all: a demoted server is left by every session."""
    for pool in pools:
        pool.siblings = pools


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
        except asyncpg.ReadOnlySQLTransactionError:
            # The server was demoted, and every session of this process is on it: none of them is lent again.
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
    """Remove from an error what it quotes of a row, since its text goes to logs, inbox rows and dead letters.

    DETAIL quotes rows: addresses, payment tokens. Messages of class 22 (data exceptions), and asyncpg's own of that
    class, quote single values; no other class does.
    """
    error.detail = None
    if isinstance(error, asyncpg.DataError):
        error.__cause__ = None  # of a value that asyncpg itself could not encode, it quotes the value too
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


async def now(conn: Connection) -> datetime:
    """Return the time on Postgres's clock, the only one that ages and retention go by: a process's may be wrong."""
    instant: datetime = await conn.fetchval("SELECT clock_timestamp()")
    return instant


def first_id(instant: datetime) -> uuid.UUID:
    """Return the lowest UUIDv7 of that time: ids are ordered by time, so a primary key finds the old rows by itself."""
    return uuid.UUID(int=int(instant.timestamp() * 1000) << 80)  # RFC 9562, section 5.7


async def writable_revision(conn: Connection) -> str | None:
    """Return the schema's revision as `revision` does, in one round trip where it has one.

    Raises asyncpg.ReadOnlySQLTransactionError, as a write would, on a session whose server was demoted.
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
    """Return the schema's revision, by a session like those of a pool. Raises what `connect` does."""
    conn = await connect(url, command_timeout=COMMAND_TIMEOUT_SECONDS)
    try:
        with errors_of_opening():
            return await revision(conn)
    finally:
        conn.terminate()  # not close: that waits for the server, which has answered


async def check(url: str) -> None:
    """Refuse what the service must not run on: what `connect` refuses, and a schema that is behind.

    Raises ConfigurationError, or DatabaseUnavailable when Postgres cannot be asked.
    """
    if is_behind(await inspect(url)):
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

    Raises ConfigurationError when the role may not, DatabaseUnavailable when others keep a table locked all the time.
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
            _pass_over_a_lock(error)
            time.sleep(MIGRATION_PAUSE_SECONDS)
    raise DatabaseUnavailable("somebody keeps a table locked (a vacuum, a backup?): not all is migrated, try again")


def _pass_over_a_lock(error: DBAPIError) -> None:
    """Return if a migration may be tried again; else raise what its error means."""
    match cause := error.orig and error.orig.__cause__:
        case asyncpg.LockNotAvailableError() | asyncpg.DeadlockDetectedError():
            return
        case asyncpg.InsufficientPrivilegeError():
            raise ConfigurationError(f"ORDERS_DATABASE_URL: {cause}: {MIGRATING_ROLE}") from error
        case BaseException() if isinstance(cause, UNAVAILABLE):
            raise unavailable(cause) from error
        case _:
            raise error

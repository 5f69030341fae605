"""Open and check a session on Postgres, in the same way for pools, checks and commands."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from app.errors import ConfigurationError, DatabaseUnavailable

CONNECT_SECONDS = 5.0  # for each of several hosts: a silent one must not use up all the time
ONLY_HOST_SECONDS = 15.0  # enough for TLS over a link with 1 s round trip
# Postgres keeps the plan of a prepared statement. If the table was nearly empty then, the plan reads the whole table,
# and goes on to do so while the table grows, until autovacuum analyzes it. So each statement is prepared anew this
# often. asyncpg's default is 300 s, in which a flash sale can add 100,000 orders.
PLAN_SECONDS = 10

UNAVAILABLE = (
    OSError,  # no connection; includes TimeoutError: no free connection, or no answer in time
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.InsufficientResourcesError,  # class 53: out of connections, memory or disk
    asyncpg.PostgresSystemError,  # class 58: its disk fails
    asyncpg.OperatorInterventionError,  # class 57: shutting down, starting up, terminated by an operator
    asyncpg.InvalidAuthorizationSpecificationError,  # class 28
    asyncpg.InvalidCatalogNameError,  # class 3D
    asyncpg.LockNotAvailableError,  # lock_timeout: another session keeps a row locked for too long
    asyncpg.ReadOnlySQLTransactionError,  # connected to a standby, as after a failover
    asyncpg.InterfaceError,  # the connection is already closed
    asyncpg.InternalClientError,  # the server has said goodbye (FATAL), and the connection is about to be closed
    asyncpg.TargetServerAttributeNotMatched,  # no host is of the kind that the URL requires
)

# A pooler refuses unknown start-up parameters, so the session sets them in the statement that checks it. What
# `set_config` sets lasts as long as the session: neither a ROLLBACK nor the pool undoes it.
OPEN_SESSION = """
SELECT current_setting('transaction_read_only') = 'on' AS read_only,  -- on a standby too
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('synchronous_standby_names') <> '' AS has_synchronous_standby,
       current_setting('server_encoding') AS encoding,
       -- Our statements rely on it. A role or database may have another default.
       set_config('default_transaction_isolation', 'read committed', false),
       -- Compiling a statement takes longer than any of ours runs, whatever the planner estimates.
       set_config('jit', 'off', false),
       -- A process that froze inside a transaction must not hold its locks for long: sagas have leases of 30 s.
       set_config('idle_in_transaction_session_timeout', '10s', false)
"""


async def connect(url: str, open_seconds: float = CONNECT_SECONDS, **options: Any) -> asyncpg.Connection:
    """Open a session that the service can rely on, at the first host of `url` that offers one.

    Each host has `open_seconds`; `options` are asyncpg's. Raises ConfigurationError if an operator must change
    something; DatabaseUnavailable while no host can be reached, or all that can are read-only or in recovery.
    """
    *others, last = _urls_by_host(plain_url(url))
    for host_url in others:
        with contextlib.suppress(DatabaseUnavailable):
            return await _connect_to(host_url, open_seconds, options)
    return await _connect_to(last, open_seconds, options)


def open_seconds(url: str) -> float:
    """Return how long opening a session may take on each host of `url`."""
    return ONLY_HOST_SECONDS if len(_urls_by_host(plain_url(url))) == 1 else CONNECT_SECONDS


def _urls_by_host(url: str) -> list[str]:
    """Return a URL for each host of `postgresql://a:5432,b:5432/orders`, so that each gets its own time limit."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if "," not in hosts:
        return [url]
    return [parts._replace(netloc=f"{user}{at}{host}").geturl() for host in hosts.split(",")]


async def _connect_to(url: str, open_seconds: float, options: dict[str, Any]) -> asyncpg.Connection:
    with errors_of_opening():
        async with asyncio.timeout(open_seconds):
            settings = {"application_name": "orders"}  # the only one that every pooler accepts
            conn: asyncpg.Connection = await asyncpg.connect(
                url, server_settings=settings, max_cached_statement_lifetime=PLAN_SECONDS, **options
            )
            try:
                await _open_session(conn)
            except BaseException:
                conn.terminate()
                raise
            return conn


async def _open_session(conn: asyncpg.Connection) -> None:
    """Set what our statements rely on, and refuse a session that could lose an order after its 201."""
    [found] = await conn.fetch(OPEN_SESSION)
    if found["read_only"]:
        raise DatabaseUnavailable("postgres: the server is read-only or in recovery")
    ignores_standby = found["synchronous_commit"] == "local" and found["has_synchronous_standby"]
    if found["synchronous_commit"] == "off" or ignores_standby:
        loss = "in a failover to the synchronous standby" if ignores_standby else "when the server crashes"
        raise ConfigurationError(
            f"ORDERS_DATABASE_URL: synchronous_commit is {found['synchronous_commit']} there, so an acknowledged order "
            f"could be lost {loss}; set it to on (or remote_apply)"
        )
    if found["encoding"] != "UTF8":
        raise ConfigurationError(
            f"ORDERS_DATABASE_URL: the encoding of the database is {found['encoding']}, which cannot keep every text; "
            "create one with ENCODING 'UTF8' TEMPLATE template0"
        )


@contextlib.contextmanager
def errors_of_opening() -> Iterator[None]:
    """Convert asyncpg's errors on a new session to ConfigurationError or DatabaseUnavailable."""
    try:
        yield
    except asyncpg.ClientConfigurationError as error:  # an InterfaceError, but no outage
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error
    except (*UNAVAILABLE, asyncpg.FeatureNotSupportedError) as error:  # a standby has no serializable transactions
        raise unavailable(error) from error
    except asyncpg.PostgresError as error:  # the server refused: an unknown parameter, a missing permission
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error


def unavailable(error: BaseException) -> DatabaseUnavailable:
    """Convert one of UNAVAILABLE to DatabaseUnavailable."""
    return DatabaseUnavailable(f"postgres: {type(error).__name__}: {error}".strip(": "))


def plain_url(url: str) -> str:
    """Convert SQLAlchemy's form of a URL to the one that asyncpg reads; its `ssl` is libpq's `sslmode`."""
    spelling, plain = "postgresql+asyncpg://", "postgresql://"
    return re.sub(r"([?&])ssl=", r"\1sslmode=", url).replace(spelling, plain, 1) if url.startswith(spelling) else url

"""A session on Postgres: opened in one way, whether for a pool, a check or a command, and checked when it opens."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from app.errors import ConfigurationError, DatabaseUnavailable

CONNECT_SECONDS = 5.0  # for each of several hosts: a silent one must not use up all the time
ONLY_HOST_SECONDS = 15.0  # over a link of 1 s round trip, with TLS

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
    asyncpg.TargetServerAttributeNotMatched,  # the URL asks for a kind of server that no host is
)

# A pooler refuses start-up parameters that it does not know, so the session sets them itself, in the statement that
# checks it. Set by `set_config` they last as long as the session: neither a ROLLBACK nor the pool undoes them.
OPEN_SESSION = """
SELECT current_setting('transaction_read_only') = 'on' AS read_only,  -- on a standby too
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('server_encoding') AS encoding,
       -- Our statements are written for it. A role or database may have another default.
       set_config('default_transaction_isolation', 'read committed', false),
       -- Compiling a statement takes longer than any of ours runs, whatever the planner believes.
       set_config('jit', 'off', false),
       -- A process that froze inside a transaction must not hold its locks for long: sagas have leases of 30 s.
       set_config('idle_in_transaction_session_timeout', '10s', false)
"""


async def connect(url: str, open_seconds: float = CONNECT_SECONDS, **options: Any) -> asyncpg.Connection:
    """Open a session that the service can rely on, at the first host of `url` that offers one.

    Each host has `open_seconds`; `options` are asyncpg's. Raises ConfigurationError for what an operator must change,
    DatabaseUnavailable for what may pass: no host can be reached, or those that can are read-only or in recovery.
    """
    *others, last = _urls_by_host(plain_url(url))
    for each in others:
        with contextlib.suppress(DatabaseUnavailable):
            return await _connect_to(each, open_seconds, options)
    return await _connect_to(last, open_seconds, options)


def open_seconds(url: str) -> float:
    """Return how long opening a session may take on each host of `url`."""
    return ONLY_HOST_SECONDS if len(_urls_by_host(plain_url(url))) == 1 else CONNECT_SECONDS


def _urls_by_host(url: str) -> list[str]:
    """Return a URL for each host of `postgresql://a:5432,b:5432/orders`: a silent one must not use up all the time."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if "," not in hosts:
        return [url]
    return [parts._replace(netloc=f"{user}{at}{host}").geturl() for host in hosts.split(",")]


async def _connect_to(url: str, open_seconds: float, options: dict[str, Any]) -> asyncpg.Connection:
    with errors_of_opening():
        async with asyncio.timeout(open_seconds):
            settings = {"application_name": "orders"}  # the one that every pooler takes
            conn: asyncpg.Connection = await asyncpg.connect(url, server_settings=settings, **options)
            try:
                await _open_session(conn)
            except BaseException:
                conn.terminate()
                raise
            return conn


async def _open_session(conn: asyncpg.Connection) -> None:
    """Set what our statements rely on, and refuse a session that could not keep what a 201 promises."""
    [found] = await conn.fetch(OPEN_SESSION)
    if found["read_only"]:
        raise DatabaseUnavailable("postgres: the server is read-only or in recovery")
    if found["synchronous_commit"] == "off":
        raise ConfigurationError(
            "ORDERS_DATABASE_URL: synchronous_commit is off there, so an acknowledged order could be lost; "
            "set it to on (or local, remote_write, remote_apply)"
        )
    if found["encoding"] != "UTF8":
        raise ConfigurationError(
            f"ORDERS_DATABASE_URL: the encoding of the database is {found['encoding']}, which cannot keep every text; "
            "create one with ENCODING 'UTF8' TEMPLATE template0"
        )


@contextlib.contextmanager
def errors_of_opening() -> Iterator[None]:
    """Turn asyncpg's errors on a new session into ConfigurationError or DatabaseUnavailable."""
    try:
        yield
    except asyncpg.ClientConfigurationError as error:  # an InterfaceError, but no outage
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error
    except (*UNAVAILABLE, asyncpg.FeatureNotSupportedError) as error:  # a standby has no serializable transactions
        raise unavailable(error) from error
    except asyncpg.PostgresError as error:  # reached, and it refused: a parameter that it does not know, no rights
        raise ConfigurationError(f"ORDERS_DATABASE_URL: {error}") from error


def unavailable(error: BaseException) -> DatabaseUnavailable:
    """Return our error for one of UNAVAILABLE."""
    return DatabaseUnavailable(f"postgres: {type(error).__name__}: {error}".strip(": "))


def plain_url(url: str) -> str:
    """Turn any of the accepted spellings into the one that asyncpg reads; SQLAlchemy's `ssl` is libpq's `sslmode`."""
    spelling, plain = "postgresql+asyncpg://", "postgresql://"
    return re.sub(r"([?&])ssl=", r"\1sslmode=", url).replace(spelling, plain, 1) if url.startswith(spelling) else url

"""Connections and transactions: an outage of Postgres is one error within a time limit; bugs are other errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from app import db
from app.errors import DatabaseUnavailable
from chaos.proxy.faults import Blackhole, Delay
from tests.harness import servers
from tests.harness.proxied import Proxied
from tests.harness.wait import AMPLE_SECONDS, wait_until

SHORT_SECONDS = 0.05


def pool_of(
    url: str, size: int, command_seconds: float = db.COMMAND_TIMEOUT_SECONDS, wait_seconds: float = AMPLE_SECONDS
) -> contextlib.AbstractAsyncContextManager[db.Pool]:
    return db.open_pool(url, size, command_seconds, wait_seconds)


@pytest.fixture
async def server(server_directory: Path) -> AsyncIterator[servers.Addressed]:
    """A server of this test's own, to be killed and frozen."""
    async with servers.postgres(server_directory) as server:
        yield server


async def answer(pool: db.Pool) -> int:
    async with db.connection(pool) as conn:
        found: int = await conn.fetchval("SELECT 42")
        return found


async def notes(pool: db.Pool) -> list[str]:
    async with db.connection(pool) as conn:
        return [row["text"] for row in await conn.fetch("SELECT text FROM notes")]


@pytest.fixture
async def noting(pool: db.Pool) -> db.Pool:
    async with db.connection(pool) as conn:
        await conn.execute("CREATE TABLE notes (text text PRIMARY KEY)")
    return pool


async def test_waiting_for_a_connection_is_limited(
    database_url: str,
) -> None:
    """A caller that waits too long gets DatabaseUnavailable; the connection can be used afterwards."""
    async with pool_of(database_url, 1) as pool:
        async with db.connection(pool):
            with pytest.raises(DatabaseUnavailable):
                async with db.connection(pool, wait_seconds=SHORT_SECONDS):
                    pytest.fail("there is only one connection")
        assert await answer(pool) == 42


async def test_a_pool_can_be_opened_before_its_server(server_directory: Path) -> None:
    """A pool connects at its first use, so its server may start later."""
    server = servers.postgres(server_directory)
    async with server:
        url = server.url
    async with pool_of(url, 1) as pool:
        with pytest.raises(DatabaseUnavailable):
            await answer(pool)
        async with server:
            assert await answer(pool) == 42


async def test_a_killed_server_is_unavailable_until_restart(
    server: servers.Addressed,
) -> None:
    """Idle and busy connections raise DatabaseUnavailable until the server is back."""

    async def busy_at_the_kill(pool: db.Pool) -> None:
        async with db.transaction(pool) as conn:
            assert await answer(pool) == 42
            await server.kill()
            await conn.execute("SELECT 1")

    async with pool_of(server.url, 2) as pool:
        with pytest.raises(DatabaseUnavailable):
            await busy_at_the_kill(pool)
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable):
                await answer(pool)
        await server.start()
        assert await answer(pool) == 42


@pytest.mark.parametrize("code", ["53100", "58030"], ids=["full", "I/O error"])
async def test_a_server_with_a_failing_disk_is_unavailable(database_url: str, code: str) -> None:
    """A statement that fails because of the server's disk raises DatabaseUnavailable, and the next one works."""
    async with pool_of(database_url, 1) as pool:
        with pytest.raises(DatabaseUnavailable):
            async with db.connection(pool) as conn:
                await conn.execute(f"DO $$ BEGIN RAISE 'no' USING ERRCODE = '{code}'; END $$")
        assert await answer(pool) == 42


async def test_a_frozen_server_is_unavailable(
    server: servers.Addressed,
) -> None:
    """Idle and new connections raise DatabaseUnavailable until the server continues."""
    async with pool_of(server.url, 2, wait_seconds=db.POOL_WAIT_SECONDS) as pool:
        assert await answer(pool) == 42
        server.freeze()
        results = await asyncio.gather(*(answer(pool) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [DatabaseUnavailable] * 3
        server.thaw()
        assert await answer(pool) == 42


async def test_a_terminated_session_is_unavailable(pool: db.Pool) -> None:
    """A session that an operator terminates raises DatabaseUnavailable, and the next one works."""

    async def busy_at_the_end() -> None:
        async with db.transaction(pool) as conn:
            async with db.connection(pool) as operator:
                await operator.execute("SELECT pg_terminate_backend($1)", conn.get_server_pid())
            await conn.execute("SELECT 1")

    with pytest.raises(DatabaseUnavailable):
        await busy_at_the_end()
    assert await answer(pool) == 42


async def test_a_session_with_asynchronous_commits_is_refused(database_url: str) -> None:
    """Also after start-up: the server may be replaced, or start, later."""
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as admin:
        name = database_url.rpartition("/")[2]
        await admin.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    async with pool_of(database_url, 1) as pool:
        with pytest.raises(DatabaseUnavailable, match="synchronous_commit is off"):
            await answer(pool)


@pytest.mark.parametrize(
    ("of", "level"), [("DATABASE {0}", "serializable"), ("ROLE CURRENT_USER IN DATABASE {0}", "repeatable read")]
)
async def test_everything_is_read_committed(pool: db.Pool, database_url: str, of: str, level: str) -> None:
    """With any default of database or role: for single statements too, and for later users of a connection."""
    name = database_url.rpartition("/")[2]
    await pool.execute(f"ALTER {of.format(name)} SET default_transaction_isolation = '{level}'")
    async with pool_of(database_url, 1) as narrow:
        for _ in range(2):
            with contextlib.suppress(ValueError):
                async with db.transaction(narrow) as conn:
                    assert await conn.fetchval("SHOW transaction_isolation") == "read committed"
                    raise ValueError
            async with db.connection(narrow) as conn:
                assert await conn.fetchval("SHOW transaction_isolation") == "read committed"


async def sessions_besides(proxied: Proxied) -> int:
    known = [conn.get_server_pid() for conn in (proxied.client, proxied.witness)]
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> ALL($1)"
    count: int = await proxied.witness.fetchval(query, known)
    return count


async def test_a_slowly_opening_connection_is_used_later(proxied: Proxied) -> None:
    """No caller waits as long as opening takes. There are never more openings than the pool's size."""
    proxied.proxy.arm(Delay(seconds=0.05))

    async def some_are_answered(pool: db.Pool) -> bool:
        results = await asyncio.gather(*(answer(pool) for _ in range(5)), return_exceptions=True)
        assert await sessions_besides(proxied) <= 2
        assert {type(result) for result in results} <= {int, DatabaseUnavailable}
        return 42 in results

    async with pool_of(proxied.url, 2, AMPLE_SECONDS, wait_seconds=SHORT_SECONDS) as pool:
        await wait_until(lambda: some_are_answered(pool), AMPLE_SECONDS, "a connection")
    proxied.client.terminate()
    await proxied.sessions_end()


async def test_abandoned_openings_expire_too(proxied: Proxied) -> None:
    """`expire_connections` also discards connections that no caller has taken yet."""
    proxied.proxy.arm(Delay(seconds=0.05))
    async with pool_of(proxied.url, 1, wait_seconds=SHORT_SECONDS) as pool:
        with pytest.raises(DatabaseUnavailable):
            await answer(pool)
        await wait_until(lambda: sessions_besides(proxied), AMPLE_SECONDS, "a session")
        await pool.expire_connections()

        async def none_is_left() -> bool:
            return await sessions_besides(proxied) == 0

        await wait_until(none_is_left, AMPLE_SECONDS, "the end of the session")


async def test_ending_a_pool_ends_its_openings(proxied: Proxied) -> None:
    """Ending a pool also ends connections that are being opened."""
    async with pool_of(proxied.url, 1, wait_seconds=SHORT_SECONDS) as pool:
        proxied.proxy.arm(Blackhole())
        with pytest.raises(DatabaseUnavailable):
            await answer(pool)
    proxied.proxy.disarm()
    proxied.client.terminate()
    await proxied.sessions_end()


async def test_a_swallowed_error_is_not_a_commit(noting: db.Pool) -> None:
    """If the block swallows an error of a statement, the transaction raises instead of committing."""

    async def swallow() -> None:
        async with db.transaction(noting) as conn:
            with contextlib.suppress(asyncpg.PostgresError):
                await conn.execute("SELECT 1 / 0")

    with pytest.raises(AssertionError, match="bug"):
        await swallow()


async def test_a_transaction_commits(noting: db.Pool) -> None:
    """A transaction commits when its block ends without an error."""
    async with db.transaction(noting) as conn:
        await conn.execute("INSERT INTO notes VALUES ('kept')")
        assert await notes(noting) == []
    assert await notes(noting) == ["kept"]


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError()])
async def test_any_error_rolls_a_transaction_back(noting: db.Pool, error: BaseException) -> None:
    """Any error rolls the transaction back, and is raised unchanged."""

    async def fail() -> None:
        async with db.transaction(noting) as conn:
            await conn.execute("INSERT INTO notes VALUES ('lost')")
            raise error

    with pytest.raises(type(error)) as caught:
        await fail()
    assert caught.value is error
    assert await notes(noting) == []


async def test_an_error_of_a_statement_is_no_outage(noting: db.Pool) -> None:
    """An error of a statement is raised as it is."""
    with pytest.raises(asyncpg.UniqueViolationError):
        async with db.transaction(noting) as conn:
            await conn.execute("INSERT INTO notes VALUES ('twice'), ('twice')")
    with pytest.raises(asyncpg.UndefinedTableError):
        async with db.connection(noting) as conn:
            await conn.execute("SELECT FROM nowhere")


@pytest.mark.parametrize(("expected", "value"), [("int", 2**31), ("int", "text"), ("text", 1), ("text", "\ud800")])
async def test_a_value_that_cannot_be_sent_is_no_outage(pool: db.Pool, expected: str, value: object) -> None:
    """A value that asyncpg cannot encode raises DataError."""
    with pytest.raises(asyncpg.DataError):
        async with db.connection(pool) as conn:
            await conn.execute(f"SELECT $1::{expected}", value)


async def test_a_cancelled_statement_affects_no_other_user(pool: db.Pool, database_url: str) -> None:
    """The connection of a cancelled statement is not lent again."""

    async def endless(narrow: db.Pool) -> None:
        async with db.transaction(narrow) as conn:
            await conn.execute("SELECT pg_sleep(3600)")

    async def is_running() -> bool:
        query = "SELECT true FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%(3600)'"
        return await pool.fetchval(query) is True

    async with pool_of(database_url, 1, command_seconds=3600) as narrow:
        task = asyncio.create_task(endless(narrow))
        await wait_until(is_running, AMPLE_SECONDS, "the statement to run")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await answer(narrow) == 42


async def test_a_frozen_process_loses_its_locks(pool: db.Pool) -> None:
    """Postgres ends the session of a process that froze inside a transaction."""
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT current_setting('idle_in_transaction_session_timeout')") == "10s"


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO notes VALUES ($1), ($1)",
        "SELECT $1::text::uuid",
        "SELECT $1::int",
    ],
)
async def test_an_error_quotes_no_value(noting: db.Pool, statement: str) -> None:
    """The text of an error goes to logs, inbox rows and dead letters."""
    with pytest.raises(asyncpg.PostgresError) as raised:
        async with db.connection(noting) as conn:
            await conn.execute(statement, "12 Private Lane")
    assert "Private Lane" not in str(raised.value)


async def test_a_goodbye_without_an_end_is_an_outage(database_url: str) -> None:
    """After a FATAL error on an idle session, before its connection ends, a statement is an outage and no bug."""
    farewell = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    parts = urlsplit(database_url)
    clients: list[asyncio.StreamWriter] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer)
        upstream = await asyncio.open_connection(parts.hostname, parts.port)
        await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
        async with pool_of(url, 1) as pool, pool_of(database_url, 1) as other:
            assert await answer(pool) == 42
            clients[0].write(b"E" + (len(farewell) + 4).to_bytes(4, "big") + farewell)
            await clients[0].drain()
            assert await answer(other) == 42  # many iterations of the event loop: the session gets the goodbye
            with pytest.raises(DatabaseUnavailable):
                async with db.transaction(pool):
                    pytest.fail("the session is over")
            assert await answer(pool) == 42

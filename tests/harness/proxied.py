"""A proxy in front of a real PostgreSQL, one client of it, and a witness with a direct connection."""

import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import asyncpg

from chaos.proxy import postgres
from chaos.proxy.faults import Lose
from chaos.proxy.proxy import Proxy
from tests.harness.wait import AMPLE_SECONDS, wait_until

NEVER_SECONDS = 3600.0
REQUEST, ANSWER = Lose(postgres.COMMIT_REQUEST), Lose(postgres.COMMIT_ANSWER)
LOST = (asyncpg.ConnectionDoesNotExistError, ConnectionResetError)  # a connection that ended below a statement
SLEEP = f"SELECT pg_sleep({NEVER_SECONDS})"
INSERT = "INSERT INTO notes VALUES ('kept')"


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(url)
    try:
        yield conn
    finally:
        conn.terminate()


@dataclass
class Proxied:
    """A proxy, one client of it, and a witness with a direct connection to the server."""

    proxy: Proxy
    url: str
    client: asyncpg.Connection
    witness: asyncpg.Connection

    async def notes(self) -> list[str]:
        return [row["text"] for row in await self.witness.fetch("SELECT text FROM notes ORDER BY text")]

    async def answers(self) -> bool:
        async with client_of(self.url) as conn:
            return bool(await conn.fetchval("SELECT 42") == 42)

    async def client_is_closed(self) -> None:
        await wait_until(self.client.is_closed, AMPLE_SECONDS, "end of the client's connection")

    async def sessions_end(self) -> None:
        """Wait until the server has ended every other session and its transaction."""
        query = "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()"
        await wait_until(lambda: self.witness.fetchval(query), AMPLE_SECONDS, "end of the sessions")

    async def server_waits(self, event: str) -> None:
        """Wait until the client's session waits for `event` in the server."""
        query = "SELECT wait_event = $2 FROM pg_stat_activity WHERE pid = $1"
        pid = self.client.get_server_pid()
        await wait_until(lambda: self.witness.fetchval(query, pid, event), AMPLE_SECONDS, event)

    async def commit_often(self, rounds: int) -> list[bool]:
        """Commit once per connection; return for each whether it was lost."""
        lost = []
        for _ in range(rounds):
            async with client_of(self.url) as conn:
                lost.append(True)
                with contextlib.suppress(*LOST):
                    await by_a_transaction(conn)
                    lost[-1] = False
        return lost


@contextlib.asynccontextmanager
async def proxied_to(url: str, dice: random.Random | None = None) -> AsyncIterator[Proxied]:
    parts = urlsplit(url)
    async with client_of(url) as witness:
        await witness.execute("CREATE TABLE notes (text text NOT NULL)")
        async with (
            Proxy(parts.hostname or "", parts.port or 0, frames=postgres, dice=dice) as proxy,
            client_of(proxy.url(url)) as client,
        ):
            yield Proxied(proxy, proxy.url(url), client, witness)


async def by_a_transaction(conn: asyncpg.Connection) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO notes VALUES ($1)", "kept")

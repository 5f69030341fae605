"""A primary and its streaming standby, as private processes that can be killed, frozen, demoted and promoted."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from tests.harness.installed import Postgres, postgres_answers
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Standby(Postgres):
    """A copy of a stopped primary, with the same databases, users and passwords."""

    def __init__(self, directory: Path, primary: Postgres) -> None:
        super().__init__(directory)
        shutil.copytree(primary.home, self.home)
        (self.home / "data" / "standby.signal").touch()
        password = (self.home / "password").read_text()
        self._settings |= {
            "primary_conninfo": f"host=127.0.0.1 port={primary.port} user=orders password={password}",
        }

    async def _wait_until_ready(self, account: object) -> None:  # noqa: ARG002 - it says "standby" when it is ready
        await wait_until(lambda: postgres_answers(self.url), AMPLE_SECONDS, "service by the standby")

    async def catch_up(self, primary: Postgres) -> None:
        """Wait until everything that the primary has committed is visible here."""
        written = await fetchval(primary.url, "SELECT pg_current_wal_lsn()::text")
        query = f"SELECT pg_last_wal_replay_lsn() >= '{written}'::pg_lsn"
        await wait_until(lambda: fetchval(self.url, query), AMPLE_SECONDS, "replay by the standby")

    async def promote(self) -> None:
        """Make it a primary."""
        await fetchval(self.url, "SELECT pg_promote()")  # waits until it is one


@contextlib.asynccontextmanager
async def primary_and_standby(directory: Path) -> AsyncIterator[tuple[Postgres, Standby]]:
    """Start both, with an empty database each."""
    primary = Postgres(directory / "primary")
    async with primary:
        pass  # create it and stop it cleanly, so its files are a backup
    standby = Standby(directory / "standby", primary)
    async with primary, standby:
        yield primary, standby


async def fetchval(url: str, query: str) -> object:
    """Run one query in a new session."""
    conn = await asyncpg.connect(url)
    try:
        return await conn.fetchval(query)
    finally:
        await conn.close()

"""A primary and its streaming standby, as private processes that can be killed, frozen, demoted and promoted."""

import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg

from app.errors import DatabaseUnavailable
from tests.harness.installed import Postgres, postgres_answers
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Standby(Postgres):
    """A copy of a running primary, made at its first start, with the same databases, users and passwords."""

    def __init__(self, directory: Path, primary: Postgres, env: Mapping[str, str] | None = None) -> None:
        super().__init__(directory, env=env)
        self._primary = primary
        self._settings |= {"wal_retrieve_retry_interval": "100ms"}  # the primary may be back at any time

    def _initialise(self, account: Any) -> None:
        password = Path(shutil.copy(self._primary.home / "password", self.home)).read_text()
        account.own(self.home)
        source = f"host=127.0.0.1 port={self._primary.port} user=orders password={password}"
        command = [self._binaries / "pg_basebackup", "--pgdata", self.home / "data", "--dbname", source]
        # A fast checkpoint, or the backup would wait for the next one. The recovery settings name the primary.
        command += ["--checkpoint=fast", "--write-recovery-conf", "--no-sync"]
        status, output = account.run(command, self.home)
        if status != 0:
            raise DatabaseUnavailable(f"pg_basebackup failed:\n{output}")

    async def _wait_until_ready(self, account: Any) -> None:
        if (self.home / "data" / "standby.signal").exists():  # it never says "ready" while it is one
            await wait_until(lambda: postgres_answers(self.url), AMPLE_SECONDS, "service by the standby")
        else:
            await super()._wait_until_ready(account)

    async def catch_up(self, primary: Postgres) -> None:
        """Wait until everything that the primary has committed is visible here."""
        written = await fetchval(primary.url, "SELECT pg_current_wal_lsn()::text")
        query = f"SELECT pg_last_wal_replay_lsn() >= '{written}'::pg_lsn"
        await wait_until(lambda: fetchval(self.url, query), AMPLE_SECONDS, "replay by the standby")

    async def promote(self) -> None:
        """Make it a primary."""
        # Its own wait would be a query with a snapshot, which replay cancels when it removes rows.
        await fetchval(self.url, "SELECT pg_promote(wait => false)")

        async def is_primary() -> bool:
            return await fetchval(self.url, "SELECT pg_is_in_recovery()") is False

        await wait_until(is_primary, AMPLE_SECONDS, "the promotion of the standby")


async def require_standby(postgres: Postgres, name: str) -> None:
    """Let every commit wait for the standby of this name; `*`: for any; empty: for none, which also ends the waits."""
    await fetchval(postgres.url, f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await fetchval(postgres.url, "SELECT pg_reload_conf()")

    async def is_set() -> bool:
        return await fetchval(postgres.url, "SELECT current_setting('synchronous_standby_names')") == name

    await wait_until(is_set, AMPLE_SECONDS, "reload of the settings")


@contextlib.asynccontextmanager
async def primary_and_standby(directory: Path) -> AsyncIterator[tuple[Postgres, Standby]]:
    """Start both, with an empty database each. Commits do not wait for the standby."""
    async with Postgres(directory / "primary") as primary, Standby(directory / "standby", primary) as standby:
        yield primary, standby


async def fetchval(url: str, query: str) -> object:
    """Run one query in a new session."""
    conn = await asyncpg.connect(url)
    try:
        return await conn.fetchval(query)
    finally:
        await conn.close()

"""Faults of PostgreSQL and of the link to it."""

import asyncio
import contextlib
import random

import asyncpg

from chaos.proxy import postgres
from chaos.proxy.faults import Blackhole, Delay, Lose
from chaos.runner.faults.acts import CALL_SECONDS, Row, arming, cutting, freezing, kill, killing
from chaos.runner.system import System
from tests.harness.standby import fetchval

LOG_POSITION = "SELECT file_offset FROM pg_walfile_name_offset(pg_current_wal_lsn())"
MOST_LOG_BYTES = 50_000  # some orders


async def _end_sessions(system: System, _: random.Random, __: float) -> None:
    await _execute(
        system,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename IS NOT NULL",
    )


async def _execute(system: System, statement: str) -> None:
    conn = await asyncpg.connect(system.postgres.url, timeout=CALL_SECONDS)
    try:
        await conn.execute(statement)
    finally:
        conn.terminate()


async def _fill_disk(system: System, rng: random.Random, seconds: float) -> None:
    """Let no file grow beyond what the log of Postgres needs soon: then it recovers in vain, until there is room."""
    server = system.postgres.primary
    position = await fetchval(server.url, LOG_POSITION)
    server.limit_files(int(str(position)) + rng.randint(0, MOST_LOG_BYTES))
    await asyncio.sleep(seconds)
    await kill(server, 0)


async def _hold_a_snapshot(system: System, _: random.Random, seconds: float) -> None:
    # Another fault may end the server or the session; then the snapshot is over, too.
    with contextlib.suppress(OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError):
        conn = await asyncpg.connect(system.postgres.url, timeout=CALL_SECONDS)
        try:
            await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM orders")
            await asyncio.sleep(seconds)
        finally:
            conn.terminate()


FAULTS: dict[str, Row] = {
    "postgres: kill -9": Row("postgres", (0.2, 2.0), killing(lambda system: system.postgres)),
    "postgres: freeze": Row("postgres", (0.5, 3.0), freezing(lambda system: system.postgres)),
    "postgres: disk full": Row("postgres", (2.0, 5.0), _fill_disk),
    "postgres: end all sessions": Row("postgres", (0.0, 0.0), _end_sessions),
    "postgres: hold a snapshot": Row("snapshot", (5.0, 15.0), _hold_a_snapshot),
    "link to postgres: cut": Row("postgres-link", (0.1, 0.5), cutting(lambda system: system.postgres_link)),
    "link to postgres: hold half of the connections past a lease": Row(
        "postgres-link", (3.5, 4.5), arming(lambda system: system.postgres_link, Blackhole(probability=0.5))
    ),
    "link to postgres: slow": Row(
        "postgres-link", (2.0, 5.0), arming(lambda system: system.postgres_link, Delay(seconds=0.05))
    ),
    "link to postgres: lose answers to COMMIT": Row(
        "postgres-link",
        (2.0, 5.0),
        arming(lambda system: system.postgres_link, Lose(postgres.COMMIT_ANSWER, probability=0.1)),
    ),
    "link to postgres: lose COMMITs": Row(
        "postgres-link",
        (2.0, 5.0),
        arming(lambda system: system.postgres_link, Lose(postgres.COMMIT_REQUEST, probability=0.1)),
    ),
}

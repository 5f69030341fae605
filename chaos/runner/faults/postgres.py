"""Faults of PostgreSQL and of the link to it."""

import asyncio
import random
import resource

import asyncpg

from chaos.proxy import postgres
from chaos.proxy.faults import Blackhole, Delay, Lose
from chaos.runner.faults.acts import CALL_SECONDS, Row, arming, cutting, freezing, kill, killing
from chaos.runner.system import System
from tests.harness import installed

WAL_SEGMENT_BYTES = 16 * 2**20


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
    """Let no file grow: sooner or later the log of Postgres cannot, so it restarts, or ends."""
    server = system.postgres.primary
    server.limit_files(rng.randint(100_000, WAL_SEGMENT_BYTES))
    await asyncio.sleep(seconds)
    server.limit_files(resource.RLIM_INFINITY)
    if server.process.poll() is not None or not await installed.postgres_answers(server.url):
        await kill(server, 0)


async def _hold_a_snapshot(system: System, _: random.Random, seconds: float) -> None:
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

"""Measure one window: what was done per second, how long it took, and what it cost."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from bench.client import Traffic
from bench.lab import Contender, Lab

WARM_UP_SECONDS = 1.0
# Without the statements of this module. BEGIN and COMMIT count.
COSTS = """
    SELECT (SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
            WHERE d.datname = $1),
           (SELECT wal_sync FROM pg_stat_wal)
"""


@dataclass(frozen=True)
class Sample:
    """One window of one contender. Latencies are None where a row measures none; costs are per unit of work."""

    rate: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_us: float  # of the contender's processes
    postgres_cpu_us: float
    statements: float
    wal_syncs: float

    @property
    def total_cpu_us(self) -> float:
        """The processor time of a unit."""
        return self.cpu_us + self.postgres_cpu_us


@dataclass(frozen=True)
class Costs:
    """What was used until now. `cpu` and `postgres_cpu` are seconds."""

    at: float
    cpu: float
    postgres_cpu: float
    statements: int
    wal_syncs: int


class Meter:
    """Reads what a contender and the server of its database use."""

    def __init__(self, lab: Lab, contender: Contender) -> None:
        self._lab = lab
        self._contender = contender

    async def read(self) -> Costs:
        """Return the costs until now."""
        cpu = cpu_seconds(self._contender.pid)
        postgres_cpu = cpu_seconds(self._lab.postgres.process.pid)
        database = urlsplit(self._contender.url).path.removeprefix("/")
        rows = await self._lab.statistics.fetch(COSTS, database)
        return Costs(time.perf_counter(), cpu, postgres_cpu, *rows[0])


async def observe(
    meter: Meter, load: Callable[[], Awaitable[Traffic]], count: Callable[[], Awaitable[int]] | None = None
) -> Sample:
    """Return the sample of a window of `load`, which is longer if nothing was done in its time.

    `count`: of finished units; default: answers to requests.
    """
    counted = await count() if count else 0
    before = await meter.read()
    done = 0
    while not done:
        traffic = await load()
        done = await count() - counted if count else len(traffic.latencies)
    after = await meter.read()
    seconds = after.at - before.at
    return Sample(
        rate=done / (seconds if count else traffic.seconds),
        p50_ms=traffic.percentile_ms(0.5) if traffic.latencies else None,
        p99_ms=traffic.percentile_ms(0.99) if traffic.latencies else None,
        cpu_us=(after.cpu - before.cpu) / done * 1e6,
        postgres_cpu_us=(after.postgres_cpu - before.postgres_cpu) / done * 1e6,
        statements=(after.statements - before.statements) / done,
        wal_syncs=(after.wal_syncs - before.wal_syncs) / done,
    )


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants, with those that have ended."""
    total = 0.0
    leader = psutil.Process(pid)
    for process in (leader, *leader.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended: its parent's times include it from now on
            times = process.cpu_times()
            total += times.user + times.system
            total += times.children_user + times.children_system
    return total

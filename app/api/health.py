"""`/livez`, `/readyz` and `/metrics`, served by every process whatever its roles.

Each dependency is checked at most once a second for all callers, over connections reserved for that.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Generic, Literal, TypeVar

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel

from app.errors import Unavailable

log = structlog.get_logger(__name__)
router = APIRouter(tags=["operations"])

CHECK_SECONDS = 2.0
PROBES_A_TURN = 2  # answered in each iteration of the event loop
FRESH_SECONDS = 1.0  # how long a result answers further callers
COUNTING_SHARE = 0.05  # the share of time that may be spent on counting rows for gauges
COUNTED_SECONDS = 10.0  # the longest pause between counts, since alerts use these gauges
COUNTING_SECONDS = 10.0  # for one statement: a million rows on a busy disk

Check = Callable[[], Awaitable[str]]
CheckStatus = Literal["ok", "degraded", "down"]
T = TypeVar("T")


class CheckRow(BaseModel):
    """The result of one check."""

    name: str
    status: CheckStatus
    detail: str


class Readiness(BaseModel):
    """Whether the process can do its work, with the result of each check."""

    status: CheckStatus
    checks: list[CheckRow]


class SharedCall(Generic[T]):
    """Runs `look` once for all callers that wait for it, and for those within `FRESH_SECONDS` after it.

    A look is a task of its own: cancelling a caller cancels neither the look nor the other callers. `share` is the
    share of time that looks may take: the result of a slow look is reused for longer, up to `COUNTED_SECONDS`.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[T]],
        share: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        fresh_seconds: float = FRESH_SECONDS,
    ) -> None:
        self._look = look
        self._share = share
        self._fresh_seconds = fresh_seconds
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._fresh_until = 0.0

    async def __call__(self) -> T:
        """Return the result of the running look, or of a fresh one; raise its error."""
        if self._task is None or (self._task.done() and self._clock() >= self._fresh_until):
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_retrieve)
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        started_at = self._clock()
        try:
            return await self._look()
        finally:
            ended = self._clock()
            rest = (ended - started_at) / self._share
            self._fresh_until = ended + max(self._fresh_seconds, min(rest, COUNTED_SECONDS))

    async def close(self) -> None:
        """Cancel a look that is running."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Retrieve the error of a look whose callers have left, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()


class Health:
    """The state behind `/readyz` and `/metrics`.

    `checks`: by name, a function that returns a detail or raises Unavailable. Without a check in `decisive` the process
    cannot do its work (503); the others only make it slower (200). `count`: sets the gauges that Postgres is asked for.
    """

    def __init__(
        self,
        checks: Mapping[str, Check],
        decisive: frozenset[str],
        registry: CollectorRegistry,
        count: Callable[[], Awaitable[None]],
    ) -> None:
        # A check that takes longer than its caller waits goes on: cut off, it would lose its connection, and never end
        # over a slow link.
        self._checks = {name: SharedCall(check, fresh_seconds=0) for name, check in checks.items()}
        self._decisive = decisive
        self._registry = registry
        self._count = SharedCall(count, COUNTING_SHARE)
        self._readiness = SharedCall(self._check_all)
        self._exposition = SharedCall(self._expose)
        self._turns = asyncio.Semaphore(PROBES_A_TURN)

    async def readiness(self) -> Readiness:
        """Check every dependency, or return the last result."""
        found = await self._readiness()
        await self.turn()
        return found

    async def exposition(self) -> bytes:
        """Render every metric, or return what was rendered last."""
        found = await self._exposition()
        await self.turn()
        return found

    async def turn(self) -> None:
        """Wait for a free iteration: an order takes many of them, and many probes must not fill any."""
        async with self._turns:
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Cancel what is running."""
        flights: list[SharedCall[Any]] = [self._readiness, self._exposition, self._count, *self._checks.values()]
        for flight in flights:
            await flight.close()

    async def _check_all(self) -> Readiness:
        rows = await asyncio.gather(*(self._check(name, check) for name, check in self._checks.items()))
        worst = {row.status for row in rows}
        return Readiness(
            status="down" if "down" in worst else "degraded" if "degraded" in worst else "ok", checks=list(rows)
        )

    async def _check(self, name: str, check: SharedCall[str]) -> CheckRow:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return CheckRow(name=name, status="ok", detail=await check())
        except Exception as error:  # noqa: BLE001 - whatever it is, readiness shows that the check has failed
            log.warning("health.failed", check=name, error=str(error) or type(error).__name__)
            detail = (error.public if isinstance(error, Unavailable) else None) or f"{name} is out of reach"
            return CheckRow(name=name, status="down" if name in self._decisive else "degraded", detail=detail)

    async def _expose(self) -> bytes:
        """Render every metric. A count that takes too long goes on, and its gauges keep their last values meanwhile."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._count()
        except (Unavailable, TimeoutError) as error:
            log.warning("metrics.stale", error=str(error))
        return generate_latest(self._registry)


@router.get("/livez", operation_id="getLiveness", summary="Is the process up?")
@router.get("/health/live", include_in_schema=False)
async def livez(request: Request) -> dict[str, str]:
    """Check no dependency: a process that answers is alive, and restarting it would not fix a dependency."""
    health: Health = request.state.health
    await health.turn()
    return {"status": "ok"}


@router.get(
    "/readyz",
    operation_id="getReadiness",
    summary="Can the process do its work?",
    response_model=Readiness,
    responses={HTTPStatus.SERVICE_UNAVAILABLE.value: {"model": Readiness}},
)
@router.get("/health/ready", include_in_schema=False)
async def readyz(request: Request) -> Response:
    """Return the result of each check; it may be a second old."""
    health: Health = request.state.health
    found = await health.readiness()
    code = HTTPStatus.SERVICE_UNAVAILABLE if found.status == "down" else HTTPStatus.OK
    return JSONResponse(found.model_dump(), code)


@router.get("/metrics", operation_id="getMetrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return every metric, at most a second old. While Postgres is down, gauges read from it keep their last values."""
    health: Health = request.state.health
    return Response(await health.exposition(), media_type=CONTENT_TYPE_LATEST)

"""`/livez`, `/readyz` and `/metrics`, served by every process, with any roles.

Each dependency is checked at most once a second for all callers, over connections reserved for checks.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from typing import Any, Generic, Literal, TypeVar

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from pydantic import BaseModel

from app.errors import Unavailable

log = structlog.get_logger(__name__)
router = APIRouter(tags=["operations"])

CHECK_SECONDS = 2.0
PROBES_PER_TURN = 2  # answered in each iteration of the event loop
FRESH_SECONDS = 1.0  # how long further callers get the same result
COUNTING_SHARE = 0.05  # the share of time that may be spent on counting rows for gauges
COUNTED_SECONDS = 10.0  # the longest pause between counts, since alerts use these gauges
COUNTING_SECONDS = 10.0  # the limit for one statement; enough for a million rows on a busy disk

WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")

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
    """Runs `call` once for all callers that wait for it, and for those that come within `fresh_seconds` after it.

    Each run is a separate task, so cancelling a caller cancels neither the run nor the other callers. `share` is the
    share of time that runs may take: the result of a slow run is reused for longer, up to `COUNTED_SECONDS`.
    """

    def __init__(
        self,
        call: Callable[[], Awaitable[T]],
        share: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        fresh_seconds: float = FRESH_SECONDS,
    ) -> None:
        self._call = call
        self._share = share
        self._fresh_seconds = fresh_seconds
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._fresh_until = 0.0

    async def __call__(self) -> T:
        """Return the result of the current run, or the last one while it is fresh. Raises the error of that run."""
        if self._task is None or (self._task.done() and self._clock() >= self._fresh_until):
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_retrieve)
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        started_at = self._clock()
        try:
            return await self._call()
        finally:
            ended_at = self._clock()
            pause = (ended_at - started_at) / self._share
            self._fresh_until = ended_at + max(self._fresh_seconds, min(pause, COUNTED_SECONDS))

    async def close(self) -> None:
        """Cancel a run that has not ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Retrieve the error of a run whose callers have left, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()


class Encoding(StrEnum):
    """How metrics are rendered, with the content type."""

    TEXT = CONTENT_TYPE_LATEST
    OPENMETRICS = openmetrics.CONTENT_TYPE_LATEST  # with exemplars


RENDERERS: Mapping[Encoding, Callable[[CollectorRegistry], bytes]] = {
    Encoding.TEXT: generate_latest,
    Encoding.OPENMETRICS: openmetrics.generate_latest,
}


def choose_encoding(accept: str) -> Encoding:
    """Return OpenMetrics if the `Accept` header asks for it, and does not prefer the text format."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        if media_type in weights:
            weights[media_type] = max(weights[media_type], _weight(parameters))
    openmetrics_weight, text_weight = weights.values()
    return Encoding.OPENMETRICS if openmetrics_weight and openmetrics_weight >= text_weight else Encoding.TEXT


def _weight(parameters: Collection[str]) -> float:
    """Return the weight `q` (RFC 9110, section 12.4.2); 0 if it is malformed."""
    given = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    return float(given) if WEIGHT.fullmatch(given) else 0.0


class Health:
    """The state behind `/readyz` and `/metrics`.

    `checks`: by name, a function that returns a detail or raises Unavailable. If a check in `decisive` fails, the
    process cannot do its work (503); the others only make it slower (200). `count` sets the gauges read from Postgres.
    """

    def __init__(
        self,
        checks: Mapping[str, Check],
        decisive: frozenset[str],
        registry: CollectorRegistry,
        count: SharedCall[None],
    ) -> None:
        # A check continues after its caller has stopped waiting. Cancelling it would close its connection, so over a
        # slow link no check would ever finish.
        self._checks = {name: SharedCall(check, fresh_seconds=0) for name, check in checks.items()}
        self._decisive = decisive
        self._registry = registry
        self._count = count
        self._readiness = SharedCall(self._check_all)
        self._expositions = {encoding: SharedCall(partial(self._expose, encoding)) for encoding in Encoding}
        self._turns = asyncio.Semaphore(PROBES_PER_TURN)

    async def readiness(self) -> Readiness:
        """Check every dependency, or return the last result."""
        readiness = await self._readiness()
        await self.wait_turn()
        return readiness

    async def exposition(self, encoding: Encoding) -> bytes:
        """Render every metric, or return the last result."""
        exposition = await self._expositions[encoding]()
        await self.wait_turn()
        return exposition

    async def wait_turn(self) -> None:
        """Wait for an iteration with few probes. An order takes many iterations, so probes must not fill them."""
        async with self._turns:
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Cancel the checks and counts that are running."""
        shown: list[SharedCall[Any]] = [self._readiness, *self._expositions.values()]
        calls: list[SharedCall[Any]] = [*shown, self._count, *self._checks.values()]
        for call in calls:
            await call.close()

    async def _check_all(self) -> Readiness:
        rows = await asyncio.gather(*(self._check(name, check) for name, check in self._checks.items()))
        statuses = {row.status for row in rows}
        return Readiness(
            status="down" if "down" in statuses else "degraded" if "degraded" in statuses else "ok", checks=list(rows)
        )

    async def _check(self, name: str, check: SharedCall[str]) -> CheckRow:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return CheckRow(name=name, status="ok", detail=await check())
        except Exception as error:  # noqa: BLE001 - any error means that the check has failed
            log.warning("health.failed", check=name, error=str(error) or type(error).__name__)
            detail = (error.public if isinstance(error, Unavailable) else None) or f"{name} is out of reach"
            return CheckRow(name=name, status="down" if name in self._decisive else "degraded", detail=detail)

    async def _expose(self, encoding: Encoding) -> bytes:
        """Render every metric. A count that takes too long continues; its gauges keep their last values until then."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._count()
        except (Unavailable, TimeoutError) as error:
            log.warning("metrics.stale", error=str(error))
        return RENDERERS[encoding](self._registry)


@router.get("/livez", operation_id="getLiveness", summary="Is the process up?")
@router.get("/health/live", include_in_schema=False)
async def livez(request: Request) -> dict[str, str]:
    """Check no dependency: a process that answers is alive, and restarting it would not fix a dependency."""
    health: Health = request.state.health
    await health.wait_turn()
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
    """Return every metric, at most a second old. While Postgres is down, gauges read from it keep their last values.

    With `Accept: application/openmetrics-text` the response is OpenMetrics, with exemplars.
    """
    health: Health = request.state.health
    encoding = choose_encoding(",".join(request.headers.getlist("accept")))
    return Response(await health.exposition(encoding), media_type=encoding.value)

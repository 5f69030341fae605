"""`/livez`, `/readyz` and `/metrics`, served by every process whatever its roles."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from app.errors import Unavailable
from app.telemetry import Metrics

log = structlog.get_logger(__name__)
router = APIRouter(tags=["operations"])

CHECK_SECONDS = 2.0

Check = Callable[[], Awaitable[str]]
Status = Literal["ok", "degraded", "down"]


@dataclass(frozen=True, slots=True)
class Health:
    """What there is to check: by name, a function that returns a detail or raises Unavailable.

    Without a check in `decisive` the process cannot do its work (503); the others only make it slower (200).
    """

    checks: Mapping[str, Check]
    decisive: frozenset[str]
    metrics: Metrics
    refresh_gauges: Callable[[], Awaitable[None]]


class CheckRow(BaseModel):
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str


class Readiness(BaseModel):
    """Whether the process can do its work."""

    status: Status
    checks: list[CheckRow]


@router.get("/livez", operation_id="getLiveness", summary="Is the process up?")
@router.get("/health/live", include_in_schema=False)
async def livez() -> dict[str, str]:
    """Check nothing: a process that answers is alive, and restarting it would mend no dependency."""
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
    """Look at every dependency, a row each."""
    health: Health = request.state.health
    rows = await asyncio.gather(*(_row(name, check, health) for name, check in health.checks.items()))
    worst = {row["status"] for row in rows}
    status: Status = "down" if "down" in worst else "degraded" if "degraded" in worst else "ok"
    code = HTTPStatus.SERVICE_UNAVAILABLE if status == "down" else HTTPStatus.OK
    return JSONResponse({"status": status, "checks": rows}, code)


async def _row(name: str, check: Check, health: Health) -> dict[str, Any]:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return {"name": name, "status": "ok", "detail": await check()}
    except (Unavailable, TimeoutError) as error:
        status = "down" if name in health.decisive else "degraded"
        log.warning("health.failed", check=name, error=str(error))
        detail = (error.public if isinstance(error, Unavailable) else None) or f"{name} is out of reach"
        return {"name": name, "status": status, "detail": detail}


@router.get("/metrics", operation_id="getMetrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return every metric; gauges that are read from Postgres keep their last value while it is out."""
    health: Health = request.state.health
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await health.refresh_gauges()
    except (Unavailable, TimeoutError) as error:
        log.warning("metrics.stale", error=str(error))
    return Response(generate_latest(health.metrics.registry), media_type=CONTENT_TYPE_LATEST)

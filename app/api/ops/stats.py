"""`/ops/stats`, for operators: counts and ages."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED
from app.api.ops.outbox import COUNTS
from app.api.ops.route import Deps, operator_router
from app.operations import stats
from app.operations.stats import StatsAnswer

router = operator_router("/ops")

REFUSALS = openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_OFFERED)
STATS: Mapping[str, Any] = {
    "orders": {"compensating": 1, "pending": 4},
    "sagas": {"in_flight": {"compensating": 1, "pending": 2}, "oldest_age_seconds": 12.5, "needs_operator": 0},
    "outbox": COUNTS,
    "pools": {
        "requests": {"open": 4, "in_use": 1, "max": 10},
        "work": {"open": 6, "in_use": 2, "max": 10},
        "relay": {"open": 2, "in_use": 1, "max": 4},
        "probes": {"open": 2, "in_use": 0, "max": 2},
    },
}


@router.get(
    "/stats",
    operation_id="getStats",
    summary="Counts and ages of the service's work",
    response_model=StatsAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(StatsAnswer, "Counts, ages, pools", STATS, "Cache-Control"),
        **REFUSALS,
    },
)
async def read_stats(deps: Deps) -> JSONResponse:
    """Return unfinished orders by status, sagas in flight, the outbox, and the use of this process's pools."""
    answer = await stats.read(deps.pool, deps.pools)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)

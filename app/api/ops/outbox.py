"""What operators see and do, for all tenants: `/ops/outbox`, `/ops/stats`; `/ops/dlq` and `/ops/sagas` are beside it.

Nobody else does. It tells of rows and what became of them, never what is in an order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, TypeVar
from uuid import UUID

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from app import db
from app.api import openapi
from app.api.body import Bodies, has_body
from app.api.orders.schemas import parse_json, validated
from app.api.params import Limited, Query, Requeue, read_query
from app.auth import guards
from app.observability.metrics import Metrics
from app.operations import outbox
from app.operations.audit import Operator
from app.operations.dead_letters import DeadLetters
from app.operations.views import OutboxAnswer, OutboxCounts
from app.orders import queries
from app.saga import maintenance

log = structlog.get_logger(__name__)

# Of every route: who calls is asked before anything else, so that nobody else learns what a valid request is.
# The first is for the document only; the second decides.
OPERATORS_ONLY = (
    Depends(
        HTTPBearer(
            auto_error=False,
            scheme_name="operator",
            description="`ORDERS_ADMIN_TOKEN`, or a token with the scope `orders:operate`",
        )
    ),
    Depends(guards.operator),
)
Who = Annotated[guards.Operator, Depends(guards.operator)]
router = APIRouter(prefix="/ops", tags=["operators"], dependencies=OPERATORS_ONLY)

Kind = TypeVar("Kind", bound=Query)

NO_STORE = {"Cache-Control": "no-store"}
NOT_OFFERED = {HTTPStatus.NOT_FOUND: ("not-found", "Not Found")}
ROW_ID = "01890a5d-ac97-7001-8000-000000000000"
NOT_PARKED = {
    HTTPStatus.NOT_FOUND: (
        "parked-row-not-found",
        "no parked outbox row has the id 01890a5d-ac97-7001-8000-000000000000",
    )
}
REFUSALS = openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_OFFERED)


@dataclass(frozen=True, slots=True)
class Operators:
    """What the routes work with: where to read, and the pools of this process by name."""

    pool: db.Pool
    pools: Mapping[str, db.Pool]
    dead_letters: DeadLetters
    on_pending: Callable[[], None]  # there is something to publish
    on_saga: Callable[[], None]  # a saga is due, or an order has ended
    metrics: Metrics
    bodies: Bodies


class Requeued(BaseModel):
    """The row that is pending again."""

    id: str


class SagaCounts(BaseModel):
    """Unfinished sagas: by the status of their orders, and those among them that need an operator."""

    in_flight: dict[str, int]
    oldest_age_seconds: float
    needs_operator: int


class PoolUse(BaseModel):
    """Database connections of this process: open, lent out, and how many there may be."""

    open: int
    in_use: int
    max: int


class StatsAnswer(BaseModel):
    """Where the service stands. `orders`: those that have not ended, by status."""

    orders: dict[str, int]
    sagas: SagaCounts
    outbox: OutboxCounts
    pools: dict[str, PoolUse]


ROW: Mapping[str, Any] = {
    "id": ROW_ID,
    "type": "orders.order.placed.v1",
    "order_id": openapi.ORDER["id"],
    "sequence": 1,
    "tenant": "default",
    "state": "parked",
    "reason": "returned: 312 NO_ROUTE",
    "attempts": 10,
    "occurred_at": openapi.ORDER["placed_at"],
    "next_attempt_at": None,
    "parked_at": "2026-11-21T04:02:11.000000Z",
}
COUNTS: Mapping[str, Any] = {"pending": 3, "oldest_pending_age_seconds": 1.25, "parked": 1}
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
    "/outbox",
    operation_id="listOutbox",
    summary="What waits to be published, and why",
    response_model=OutboxAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(
            OutboxAnswer, "Counts, and the first rows", {**COUNTS, "rows": [ROW]}, "Cache-Control"
        ),
        **REFUSALS,
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    openapi_extra={"parameters": openapi.query_parameters(Limited)},
)
async def read_outbox(request: Request) -> JSONResponse:
    """Return how many events are pending and parked, and `limit` of them: parked ones first, then the longest due."""
    operators: Operators = request.state.operators
    limit = read_query(Limited, request.query_params.multi_items()).limit
    async with db.connection(operators.pool) as conn:
        answer = await OutboxAnswer.of_first(conn, limit)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/outbox/{row_id}/requeue",
    operation_id="requeueOutboxMessage",
    summary="Let a parked event be published again",
    description=(
        "The row goes back to pending, with all its attempts. It needs no Idempotency-Key: done a second time it is "
        "the same, and answered with 404, as the row is parked no more."
    ),
    response_model=Requeued,
    responses={
        HTTPStatus.OK.value: openapi.answered(Requeued, "It is pending", {"id": ROW_ID}),
        **openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_PARKED),
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY, *openapi.BODY_REFUSALS),
    },
    openapi_extra=openapi.request_body(Requeue, required=False),
)
async def requeue(request: Request, operator: Who, row_id: UUID) -> JSONResponse:
    """Requeue one row. Raises ParkedRowNotFound."""
    operators: Operators = request.state.operators
    asked = await read_optional_body(request, operator, Requeue)
    await outbox.requeue(operators.pool, row_id, Operator(operator.subject, asked.reason or ""))
    operators.on_pending()
    log.info("outbox.requeued", event_id=str(row_id), operator=operator.subject)
    return JSONResponse(Requeued(id=str(row_id)).model_dump())


@router.get(
    "/stats",
    operation_id="getStats",
    summary="Where the service stands",
    response_model=StatsAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(StatsAnswer, "Counts, ages, pools", STATS, "Cache-Control"),
        **REFUSALS,
    },
)
async def read_stats(request: Request) -> JSONResponse:
    """Return unfinished orders by status, sagas in flight, the outbox, and this process's use of its pools."""
    operators: Operators = request.state.operators
    async with db.connection(operators.pool) as conn:
        unfinished = await queries.unfinished(conn)
        sagas = await maintenance.stats(conn)
        counts = await OutboxCounts.read(conn)
    answer = StatsAnswer(
        orders={status.value: number for status, number in unfinished.items()},
        sagas=SagaCounts(
            in_flight={status.value: sagas.in_flight.get(status, 0) for status in unfinished},
            oldest_age_seconds=max(0.0, sagas.oldest_age_seconds),
            needs_operator=sagas.needs_operator,
        ),
        outbox=counts,
        pools={name: _use(pool) for name, pool in operators.pools.items()},
    )
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


async def read_optional_body(request: Request, who: guards.Operator, kind: type[Kind]) -> Kind:
    """Read what goes with a change; no body, or an empty one, means `{}`.

    Raises ValidationFailed, and as `Bodies.read` does.
    """
    operators: Operators = request.state.operators
    if not has_body(request):
        return kind()
    body = await operators.bodies.read(request, who.source)
    return validated(kind, parse_json(body) if body.strip() else {}, "the body is not valid")


def _use(pool: db.Pool) -> PoolUse:
    size = pool.get_size()
    return PoolUse(open=size, in_use=size - pool.get_idle_size(), max=pool.get_max_size())

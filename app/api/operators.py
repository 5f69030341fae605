"""What operators see of the whole service, all tenants of it: `GET /ops/outbox`, `GET /ops/stats`. Nobody else does.

It tells of rows and what became of them, never what is in an order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from app import db
from app.api import openapi, security
from app.api.queries import Limited, read_query
from app.messaging import outbox
from app.orders import reading
from app.orders.models import rfc3339
from app.saga import store

# For the document only; `security.operator` decides.
DOCUMENTED = HTTPBearer(auto_error=False, scheme_name="operator", description="`ORDERS_ADMIN_TOKEN`")
router = APIRouter(prefix="/ops", tags=["operators"], dependencies=[Depends(DOCUMENTED)])

NO_STORE = {"Cache-Control": "no-store"}
NOT_OFFERED = {HTTPStatus.NOT_FOUND: ("not-found", "Not Found")}
REFUSALS = openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_OFFERED)


@dataclass(frozen=True, slots=True)
class Operators:
    """What the routes work with: where to read, and the pools of this process by name."""

    pool: db.Pool
    pools: Mapping[str, db.Pool]


class OutboxCounts(BaseModel):
    """How much the outbox holds. Ages are seconds, 0 where there is nothing."""

    pending: int
    oldest_pending_age_seconds: float
    parked: int


class OutboxRow(BaseModel):
    """One event that is not out. `reason`: what the broker said last, or what the event waits behind; null: nothing.

    `state`: `parked` until an operator decides; `claimed` by a relay, or `waiting`, until `next_attempt_at`.
    """

    id: str
    type: str
    order_id: str
    sequence: int
    tenant: str
    state: Literal["waiting", "claimed", "parked"]
    reason: str | None
    attempts: int
    occurred_at: str
    next_attempt_at: str | None
    parked_at: str | None


class OutboxAnswer(OutboxCounts):
    """The outbox: counts of all, and the rows that need a look first: parked ones, then those due longest."""

    rows: list[OutboxRow]


class SagaCounts(BaseModel):
    """Unfinished sagas, by the status of their orders."""

    in_flight: dict[str, int]
    oldest_age_seconds: float


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
    "id": "01890a5d-ac97-7001-8000-000000000000",
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
    "sagas": {"in_flight": {"compensating": 1, "pending": 2}, "oldest_age_seconds": 12.5},
    "outbox": COUNTS,
    "pools": {"requests": {"open": 4, "in_use": 1, "max": 10}, "work": {"open": 6, "in_use": 2, "max": 10}},
}


@router.get(
    "/outbox",
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
    await security.operator(request)
    operators: Operators = request.state.operators
    limit = read_query(Limited, request.query_params.multi_items()).limit
    async with db.connection(operators.pool) as conn:
        counts = await _outbox_counts(conn)
        rows = [_row(each) for each in await outbox.unpublished(conn, limit)]
    return JSONResponse(OutboxAnswer(**counts.model_dump(), rows=rows).model_dump(), headers=NO_STORE)


@router.get(
    "/stats",
    summary="Where the service stands",
    response_model=StatsAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(StatsAnswer, "Counts, ages, pools", STATS, "Cache-Control"),
        **REFUSALS,
    },
)
async def read_stats(request: Request) -> JSONResponse:
    """Return unfinished orders by status, sagas in flight, the outbox, and this process's use of its pools."""
    await security.operator(request)
    operators: Operators = request.state.operators
    async with db.connection(operators.pool) as conn:
        unfinished = await reading.unfinished(conn)
        in_flight, oldest = await store.stats(conn)
        counts = await _outbox_counts(conn)
    answer = StatsAnswer(
        orders={status.value: number for status, number in unfinished.items()},
        sagas=SagaCounts(
            in_flight={status.value: in_flight.get(status, 0) for status in unfinished},
            oldest_age_seconds=max(0.0, oldest),
        ),
        outbox=counts,
        pools={name: _use(pool) for name, pool in operators.pools.items()},
    )
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


async def _outbox_counts(conn: db.Connection) -> OutboxCounts:
    pending, age, parked = await outbox.stats(conn)
    return OutboxCounts(pending=pending, oldest_pending_age_seconds=age, parked=parked)


def _row(row: outbox.Unpublished) -> OutboxRow:
    reason = row.last_error
    if reason is None and row.behind is not None:
        reason = f"waits for sequence {row.behind} of the same order"
    return OutboxRow(
        id=str(row.id),
        type=row.type,
        order_id=row.subject,
        sequence=row.sequence,
        tenant=row.tenant,
        state="parked" if row.parked_at else "claimed" if row.claimed else "waiting",
        reason=reason,
        attempts=row.attempts,
        occurred_at=rfc3339(row.occurred_at),
        next_attempt_at=None if row.parked_at else rfc3339(row.next_attempt_at),
        parked_at=rfc3339(row.parked_at) if row.parked_at else None,
    )


def _use(pool: db.Pool) -> PoolUse:
    size = pool.get_size()
    return PoolUse(open=size, in_use=size - pool.get_idle_size(), max=pool.get_max_size())

"""`/ops/outbox`, for operators: show pending and parked events, and requeue a parked one."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import Body, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED, OpsDeps
from app.api.ops.route import Deps, Operator, operator_router
from app.api.params import DEFAULT_LIMIT, Limit, ReasonText, StrictModel
from app.messaging.facts import EventsPending
from app.operations import outbox
from app.operations.audit import AuditActor
from app.operations.outbox import OutboxAnswer

log = structlog.get_logger(__name__)
router = operator_router("/ops/outbox")

ROW_ID = "01890a5d-ac97-7001-8000-000000000000"
NOT_PARKED = {
    HTTPStatus.NOT_FOUND: (
        "parked-row-not-found",
        "no parked outbox row has the id 01890a5d-ac97-7001-8000-000000000000",
    )
}
REFUSALS = openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_OFFERED)


class ListOutbox(StrictModel):
    """The query of `GET /ops/outbox`."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="rows in one answer")


class RequeueRequest(StrictModel):
    """The body of `POST /ops/outbox/{id}/requeue`."""

    reason: ReasonText | None = Field(default=None, description="the reason, recorded with the action")


class Requeued(BaseModel):
    """The outbox row that is pending again."""

    id: str


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


@router.get(
    "",
    operation_id="listOutbox",
    summary="Events that are not published yet, and why",
    response_model=OutboxAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(
            OutboxAnswer, "Counts, and the first rows", {**COUNTS, "rows": [ROW]}, "Cache-Control"
        ),
        **REFUSALS,
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY),
    },
)
async def read_outbox(deps: Deps, query: Annotated[ListOutbox, Query()]) -> JSONResponse:
    """Return the numbers of pending and parked events, and `limit` of them: parked ones first, then by due time."""
    answer = await outbox.read_rows(deps.pool, query.limit)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/{row_id}/requeue",
    operation_id="requeueOutboxMessage",
    summary="Requeue a parked event",
    description=(
        "The row becomes pending again, with all attempts left. No Idempotency-Key is needed: a second request changes "
        "nothing, and its answer is 404, because the row is not parked any more."
    ),
    response_model=Requeued,
    responses={
        HTTPStatus.OK.value: openapi.response(Requeued, "The row is pending", {"id": ROW_ID}),
        **openapi.problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, examples=NOT_PARKED),
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY, *openapi.BODY_REFUSALS),
    },
)
async def requeue(
    deps: Deps, operator: Operator, row_id: UUID, body: Annotated[RequeueRequest, Body(default_factory=RequeueRequest)]
) -> JSONResponse:
    """Requeue one row. Raises ParkedRowNotFound."""
    await requeue_one(deps, row_id, AuditActor(operator.subject, body.reason or ""))
    return JSONResponse(Requeued(id=str(row_id)).model_dump())


async def requeue_one(deps: OpsDeps, row_id: UUID, actor: AuditActor) -> UUID | None:
    """Requeue one row, and wake the relay. Return the row's order. Raises ParkedRowNotFound."""
    order_id = await outbox.requeue(deps.pool, row_id, actor)
    deps.signals.emit(EventsPending())
    log.info("outbox.requeued", event_id=str(row_id), operator=actor.name)
    return order_id


async def requeue_all(deps: OpsDeps, limit: int, actor: AuditActor) -> int:
    """Requeue up to `limit` rows, longest parked first, and wake the relay. Return how many."""
    requeued = await outbox.requeue_all(deps.pool, limit, actor)
    deps.signals.emit(EventsPending())
    log.info("outbox.requeued", rows=requeued, operator=actor.name)
    return requeued

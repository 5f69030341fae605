"""`/ops/sagas`, for operators: list unfinished sagas, show one with its log, retry it, compensate it.

The writes need no Idempotency-Key: a second request finds the result of the first and reports it.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import Body, Query
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, WithJsonSchema

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED, OpsDeps
from app.api.ops.route import Deps, NoQuery, Operator, operator_router
from app.api.orders.timeline import EXAMPLE as TIMELINE
from app.api.params import DEFAULT_LIMIT, Limit, ReasonText, StrictModel, parse_unfinished
from app.observability.traces import trace_headers
from app.operations import saga_views, sagas
from app.operations.audit import AuditActor
from app.operations.saga_views import SagaAnswer, SagaChanged, SagasAnswer
from app.operations.sagas import ActionOutcome, SagaAction
from app.orders.facts import OrderFinished
from app.orders.model import UNFINISHED, Status
from app.saga.facts import SagaDue

log = structlog.get_logger(__name__)
router = operator_router("/ops/sagas")


def _parse_flag(text: object) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


Unfinished = Annotated[
    Status, BeforeValidator(parse_unfinished), WithJsonSchema({"type": "string", "enum": list(UNFINISHED)})
]
Flag = Annotated[bool, BeforeValidator(_parse_flag), WithJsonSchema({"type": "boolean", "default": False})]


class ListSagas(StrictModel):
    """The query of `GET /ops/sagas`."""

    status: Unfinished | None = Field(default=None, description="only sagas whose orders have this status")
    stuck: Flag = Field(default=False, description="only sagas that need attention: late, or due and not claimed")
    limit: Limit = Field(default=DEFAULT_LIMIT, description="sagas in one answer")


class SagaActionRequest(StrictModel):
    """The body of `POST /ops/sagas/{id}/retry` and `POST /ops/sagas/{id}/compensate`."""

    reason: ReasonText = Field(description="the reason, recorded with the action")


ReasonBody = Annotated[SagaActionRequest, Body()]

ORDER_ID = openapi.ORDER["id"]
SAGA: Mapping[str, Any] = {
    "order_id": ORDER_ID,
    "tenant": "default",
    "status": "compensating",
    "direction": "backward",
    "step": "charge_payment",
    "attempts": 12,
    "reason": "timed-out",
    "age_seconds": 1260.5,
    "next_attempt_in_seconds": 17.2,
    "lease_owner": None,
    "deadline_at": "2026-11-21T04:02:27.123456Z",
    "stuck": True,
}
LISTED: Mapping[str, Any] = {
    "sagas": [{**SAGA, "last_outcome": "unknown", "last_detail": "HTTP 500"}],
    "unstarted": [
        {
            "order_id": ORDER_ID,
            "tenant": "default",
            "event": "purged",
            "since": "2026-11-21T04:02:11.000000Z",
            "attempts": 7,
            "reason": "UniqueViolationError: duplicate key",
            "age_seconds": 1260.5,
        }
    ],
}
SHOWN: Mapping[str, Any] = {
    "timeline": TIMELINE["entries"],
    "why_stuck": TIMELINE["why_stuck"],
    "order_id": ORDER_ID,
    "tenant": "default",
    "status": "compensating",
    "status_reason": "timed-out",
    "version": 2,
    "placed_at": openapi.ORDER["placed_at"],
    "updated_at": "2026-11-21T04:02:27.401020Z",
    "saga": SAGA,
    "log": [
        {
            "at": "2026-11-21T04:08:11.000000Z",
            "action": "undo",
            "step": "charge_payment",
            "attempt": 12,
            "outcome": "unknown",
            "detail": "HTTP 500",
            "reply": None,
        }
    ],
    "operator_actions": [
        {
            "at": "2026-11-21T04:08:10.000000Z",
            "actor": "admin-token",
            "action": "retry",
            "reason": "the payment provider is back",
            "outcome": "due",
        }
    ],
}
RETRIED: Mapping[str, Any] = {
    "order_id": ORDER_ID, "action": "retry", "outcome": "due", "message": f"{ORDER_ID} is due at once",
}  # fmt: skip
COMPENSATED: Mapping[str, Any] = {
    "order_id": ORDER_ID, "action": "compensate", "outcome": "turns-back", "message": f"{ORDER_ID} turns back",
}  # fmt: skip
WRITE_REFUSALS = (*openapi.BODY_REFUSALS, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
EXAMPLE = {"requestBody": {"content": {"application/json": {"example": {"reason": "the payment provider is back"}}}}}


@router.get(
    "",
    operation_id="listSagas",
    summary="Unfinished sagas",
    response_model=SagasAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(SagasAnswer, "The first sagas", LISTED, "Cache-Control"),
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, examples=NOT_OFFERED),
    },
)
async def list_sagas(deps: Deps, query: Annotated[ListSagas, Query()]) -> JSONResponse:
    """Show unfinished sagas with their last outcome: those that need attention first, then the oldest first.

    The answer also has the orders that cannot start, because their `order.placed` is a dead letter or was purged.
    """
    answer = await saga_views.read_unfinished(deps.pool, deps.consumer, query.limit, query.status, stuck=query.stuck)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.get(
    "/{order_id}",
    operation_id="getSaga",
    summary="A saga with its log",
    response_model=SagaAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(
            SagaAnswer, "The saga, its log, and the actions of operators", SHOWN, "Cache-Control"
        ),
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
)
async def show(deps: Deps, order_id: UUID, _: NoQuery) -> JSONResponse:
    """Show an order's saga, every call to a partner with its outcome, and the actions of operators."""
    answer = await saga_views.read_one(deps.pool, order_id, deps.consumer)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/{order_id}/retry",
    operation_id="retrySaga",
    summary="Retry a waiting saga at once",
    response_model=SagaChanged,
    responses={
        HTTPStatus.OK.value: openapi.response(SagaChanged, "The outcome", RETRIED, "Cache-Control"),
        **openapi.problems(
            *WRITE_REFUSALS,
            examples={HTTPStatus.CONFLICT: ("saga-not-retriable", "the order is confirmed")},
        ),
    },
    openapi_extra=EXAMPLE,
)
async def retry(deps: Deps, operator: Operator, order_id: UUID, body: ReasonBody, _: NoQuery) -> JSONResponse:
    """Make the saga due now, in its current direction. A saga that a process is running is not changed.

    No Idempotency-Key is needed: making a due saga due again changes nothing.
    """
    outcome = await change(deps, order_id, SagaAction.RETRY, AuditActor(operator.subject, body.reason))
    return _answer_changed(order_id, SagaAction.RETRY, outcome)


@router.post(
    "/{order_id}/compensate",
    operation_id="compensateSaga",
    summary="Compensate a saga",
    response_model=SagaChanged,
    responses={
        HTTPStatus.OK.value: openapi.response(SagaChanged, "The outcome", COMPENSATED, "Cache-Control"),
        **openapi.problems(
            *WRITE_REFUSALS,
            examples={HTTPStatus.CONFLICT: ("order-not-cancellable", "the order is confirmed")},
        ),
    },
    openapi_extra=EXAMPLE,
)
async def compensate(deps: Deps, operator: Operator, order_id: UUID, body: ReasonBody, _: NoQuery) -> JSONResponse:
    """Undo every step of the order. After the answer the order can never become `confirmed`.

    It ends `rejected` with the reason `compensated-by-operator`, or `cancelled` with it if its saga had not started.
    No Idempotency-Key is needed: a saga starts compensating once.
    """
    outcome = await change(deps, order_id, SagaAction.COMPENSATE, AuditActor(operator.subject, body.reason))
    return _answer_changed(order_id, SagaAction.COMPENSATE, outcome)


async def change(deps: OpsDeps, order_id: UUID, action: SagaAction, actor: AuditActor) -> ActionOutcome:
    """Do what an operator asks for, wake the sagas of this process, and count an order that the action ended.

    Raises OrderNotFound, SagaNotRetriable and OrderNotCancellable.
    """
    match action:
        case SagaAction.RETRY:
            outcome = await sagas.retry(deps.pool, order_id, actor)
        case SagaAction.COMPENSATE:
            outcome = await sagas.compensate(deps.pool, order_id, actor, trace_headers())
        case SagaAction.CANCEL:
            outcome = await sagas.cancel(deps.pool, order_id, actor, trace_headers())
    if outcome is ActionOutcome.CANCELLED:
        deps.signals.emit(OrderFinished(order_id, Status.CANCELLED, sagas.REASONS[action]))
    deps.signals.emit(SagaDue())
    log.info("saga.operated", action=action, operator=actor.name, order_id=str(order_id), outcome=outcome)
    return outcome


def _answer_changed(order_id: UUID, action: SagaAction, outcome: ActionOutcome) -> JSONResponse:
    return JSONResponse(SagaChanged.of(order_id, action, outcome).model_dump(), headers=NO_STORE)

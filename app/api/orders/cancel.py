"""The route `POST /orders/{id}/cancel`."""

from dataclasses import replace
from http import HTTPStatus
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, Response

from app import db
from app.api import openapi
from app.api.body import Bodies, has_body
from app.api.orders.place import KEY_PARAMETER, Intake, render
from app.api.orders.schemas import OrderAnswer, parse_json
from app.auth.guards import caller
from app.errors import MalformedRequest, ValidationFailed
from app.idempotency import transaction
from app.idempotency.store import Answer
from app.observability.traces import trace_headers
from app.orders.model import Order, Status
from app.saga import cancel as saga_cancel

log = structlog.get_logger(__name__)
router = APIRouter(tags=["orders"])


@router.post(
    "/orders/{order_id}/cancel",
    operation_id="cancelOrder",
    summary="Cancel an order",
    description=(
        "200: the order is cancelled. 202: its saga has started and turns back; the order ends `cancelled` (or "
        "`rejected`, where before that a partner or an operator had turned it back or its time was up), never "
        "`confirmed`. "
        "409 `order-not-cancellable`: it was confirmed or rejected before. Cancelling an order again does no harm."
    ),
    response_model=OrderAnswer,
    responses={
        HTTPStatus.ACCEPTED.value: {"model": OrderAnswer, "description": "The order turns back"},
        **openapi.problems(*openapi.BODY_REFUSALS, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
    },
    openapi_extra={
        "parameters": [KEY_PARAMETER],
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"type": "object", "additionalProperties": False}}},
        },
    },
)
async def cancel(request: Request, order_id: UUID) -> Response:
    """Answer 200 or 202 once it is durable that the order will never be confirmed; with a known key, that again."""
    intake: Intake = request.state.intake
    sender = await caller(request, "orders:write")
    tenant = sender.tenant
    await _read_nothing(request, intake.bodies, sender.source)
    key = intake.idempotency.key(request, tenant, {})
    ended_now = False

    async def act(conn: db.Connection) -> Answer:
        nonlocal ended_now
        cancelled = await saga_cancel.cancel(conn, tenant, order_id, trace_headers())
        ended_now = cancelled.ended_now
        return _rendered(cancelled.order)

    async def write(wait_seconds: float) -> Answer:
        ttl_seconds = intake.idempotency.ttl_seconds
        return await transaction.once(intake.pool, key, act, ttl_seconds=ttl_seconds, wait_seconds=wait_seconds)

    answer = await intake.idempotency.answer(key, write)
    return _answered(intake, answer, ended_now=ended_now)


async def _read_nothing(request: Request, bodies: Bodies, source: str) -> None:
    """Read a body that may be absent, empty or `{}`. Raises ValidationFailed, and as reading an order's body does."""
    if not has_body(request):
        return  # whatever type it claims: some clients name one for nothing
    body = await bodies.read(request, source)
    try:
        empty = not body.strip() or parse_json(body) == {}
    except MalformedRequest:
        empty = False
    if not empty:
        raise ValidationFailed("the body of a cancel must be empty, or {}")


def _rendered(order: Order) -> Answer:
    status = HTTPStatus.OK if order.status is Status.CANCELLED else HTTPStatus.ACCEPTED
    return replace(render(order), status=status)


def _answered(intake: Intake, answer: Answer, *, ended_now: bool) -> Response:
    headers = {"Location": answer.location}
    if answer.replayed:
        headers["Idempotent-Replay"] = "true"
    else:
        intake.checkpoint("cancel.committed")
        if ended_now:
            intake.metrics.orders_finished.labels("cancelled", "cancelled-by-customer").inc()
        intake.on_cancelled()
        log.info("order.cancelled", order_id=answer.location.rpartition("/")[2], status=answer.status)
    return Response(answer.body, answer.status, headers, media_type="application/json")

"""The route `POST /orders/{id}/cancel`. It reads its caller and body by hand, like `POST /orders` (see `place`)."""

from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter, Request, Response

from app import db
from app.api import openapi
from app.api.body import Bodies, has_body, parse_json
from app.api.orders.deps import KEY_PARAMETER, OrdersDeps, send, stored_response
from app.api.orders.schemas import OrderAnswer
from app.auth.guards import authenticate_caller
from app.errors import MalformedRequest, ValidationFailed
from app.idempotency.store import StoredResponse
from app.observability.traces import trace_headers
from app.orders.facts import CancelAccepted, OrderFinished
from app.orders.model import Reason, Status
from app.saga import cancel as cancellation

router = APIRouter(tags=["orders"])


@router.post(
    "/orders/{order_id}/cancel",
    operation_id="cancelOrder",
    summary="Cancel an order",
    description=(
        "200: the order is cancelled. 202: its saga has started, and now compensates; the order ends `cancelled`, or "
        "`rejected` if its saga was already compensating for another reason, but never `confirmed`. "
        "409 `order-not-cancellable`: it was already confirmed or rejected. Cancelling an order again is harmless."
    ),
    response_model=OrderAnswer,
    responses={
        HTTPStatus.ACCEPTED.value: {"model": OrderAnswer, "description": "The saga compensates"},
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
    """Answer 200 or 202 once the cancellation is durable; replay the first response for a known key."""
    deps: OrdersDeps = request.state.orders
    sender = await authenticate_caller(request, "orders:write")
    await _require_no_body(request, deps.bodies, sender.source)
    key = deps.bind_key(request, sender.tenant, {})
    ended_now = False

    async def write(conn: db.Connection) -> StoredResponse:
        nonlocal ended_now
        cancelled = await cancellation.cancel(conn, sender.tenant, order_id, trace_headers())
        ended_now = cancelled.ended_now
        is_cancelled = cancelled.order.status is Status.CANCELLED
        return stored_response(cancelled.order, HTTPStatus.OK if is_cancelled else HTTPStatus.ACCEPTED)

    result = await deps.idempotency.run_single(key, write)
    if not result.replayed:
        deps.signals.crash_point("cancel.committed")
        deps.signals.emit(CancelAccepted(order_id, result.status))
        if ended_now:
            deps.signals.emit(OrderFinished(order_id, Status.CANCELLED, Reason.CANCELLED_BY_CUSTOMER))
    return send(result)


async def _require_no_body(request: Request, bodies: Bodies, source: str) -> None:
    """Read a body that must be absent, empty or `{}`. Raises ValidationFailed and the errors of `Bodies.read`."""
    if not has_body(request):
        return  # ignore its Content-Type: some clients send one without a body
    body = await bodies.read(request, source)
    try:
        empty = not body or parse_json(body) == {}
    except MalformedRequest:
        empty = False
    if not empty:
        raise ValidationFailed("the body of a cancel must be empty, or {}")

"""The route `POST /orders`.

This route sets the service's throughput, so it reads its caller and body by hand, and the middleware calls it directly.
FastAPI, which documents it, would solve dependencies, hold exit stacks and serialise a response for each request.
"""

from http import HTTPStatus

import structlog
from fastapi import APIRouter, Request, Response
from opentelemetry import trace

from app.api import openapi
from app.api.orders.deps import KEY_PARAMETER, OrdersDeps, send, stored_response
from app.api.orders.schemas import OrderAnswer, PlaceOrderRequest, read_place_order
from app.auth.guards import authenticate_caller
from app.idempotency.key import RawRequest
from app.idempotency.store import StoredResponse
from app.observability import log_fields
from app.observability.traces import trace_headers
from app.orders import store
from app.orders.facts import OrderPlaced
from app.orders.store import TracedOrder

log = structlog.get_logger(__name__)


router = APIRouter(tags=["orders"])


@router.post(
    "/orders",
    operation_id="placeOrder",
    status_code=HTTPStatus.CREATED,
    summary="Place an order",
    response_model=OrderAnswer,
    responses={
        HTTPStatus.CREATED: openapi.REPLAYABLE,
        **openapi.problems(*openapi.BODY_REFUSALS, HTTPStatus.CONFLICT),
    },
    openapi_extra={"parameters": [KEY_PARAMETER], **openapi.request_body(PlaceOrderRequest)},
)
async def place(request: Request) -> Response:
    """Answer 201 once order and event are durable; replay the first response for a known Idempotency-Key."""
    deps: OrdersDeps = request.state.orders
    sender = await authenticate_caller(request, "orders:write")
    body = await deps.bodies.read(request, sender.source)
    raw_request = deps.raw_request(request, sender.tenant, body)
    result = deps.replay_memory.find(raw_request) or await _place(deps, raw_request, body)
    order_id = result.location.rpartition("/")[2]
    if (span := trace.get_current_span()).is_recording():
        span.set_attributes(
            {"orders.order_id": order_id, "orders.tenant": sender.tenant, "orders.replayed": result.replayed}
        )
    if result.replayed:
        log.info("order.replayed", order_id=order_id)
    else:
        deps.signals.crash_point("intake.committed")
        deps.signals.emit(OrderPlaced(order_id))
    return send(result)


async def _place(deps: OrdersDeps, raw_request: RawRequest, raw_body: bytes) -> StoredResponse:
    """Take the order, or replay the response that the key has in Redis or Postgres."""
    tenant = raw_request.tenant
    body = read_place_order(raw_body)

    def make() -> tuple[TracedOrder, StoredResponse]:
        row = store.new_order(body.command(tenant), trace_headers())
        log_fields.bind(order_id=str(row.order.id))
        return row, stored_response(row.order, HTTPStatus.CREATED)

    key = raw_request.bind(body.normal_form())
    with deps.signals.span("order transaction", attributes={"orders.tenant": tenant}):
        result = await deps.idempotency.run(key, store.insert, make, deps.admit)
    deps.replay_memory.keep(raw_request, result)
    return result

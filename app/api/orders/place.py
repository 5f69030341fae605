"""The route `POST /orders`.

This route sets the service's throughput. So it reads its caller and body by hand, and `PlainRoute` calls it without
FastAPI's machinery, which would solve dependencies, hold two exit stacks and serialise a response for each request.
"""

from http import HTTPStatus
from typing import Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from opentelemetry import trace
from starlette.routing import request_response
from starlette.types import ASGIApp, Receive, Scope, Send

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


class PlainRoute(APIRoute):
    """A route that FastAPI documents and Starlette calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answer: ASGIApp = request_response(self.endpoint)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of this route's method; leave the 405 to FastAPI."""
        handle = self._answer if scope["method"] in (self.methods or ()) else super().handle
        await handle(scope, receive, send)


router = APIRouter(tags=["orders"], route_class=PlainRoute)


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
    order_id = UUID(result.location.rpartition("/")[2])
    trace.get_current_span().set_attributes(
        {"orders.order_id": str(order_id), "orders.tenant": sender.tenant, "orders.replayed": result.replayed}
    )
    if result.replayed:
        log.info("order.replayed", order_id=str(order_id))
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

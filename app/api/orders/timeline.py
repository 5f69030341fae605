"""The routes that tell an order's story: at once as `/timeline`, and live as `/events`."""

from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.sse import EventSourceResponse

from app.api import openapi
from app.api.orders.deps import OrdersDeps
from app.auth.guards import authenticate_caller
from app.errors import MalformedRequest
from app.operations import timeline
from app.operations.timeline import Position, TimelineAnswer

router = APIRouter(tags=["orders"])

LAST_EVENT_ID = "Last-Event-ID"
NO_STORE = {"Cache-Control": "no-store"}
STREAM = {**NO_STORE, "X-Accel-Buffering": "no"}  # nginx, for one, would otherwise hold events back
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
EXAMPLE = {
    "order_id": openapi.ORDER["id"],
    "status": "pending",
    "entries": [
        {
            "id": "placed",
            "at": openapi.ORDER["placed_at"],
            "source": "request",
            "event": "order-placed",
            "step": None,
            "attempt": None,
            "outcome": None,
            "detail": None,
            "seconds": None,
            "trace_id": TRACE_ID,
        },
        {
            "id": "17",
            "at": "2026-11-21T03:47:03.401020Z",
            "source": "saga",
            "event": "do",
            "step": "charge_payment",
            "attempt": 2,
            "outcome": "unknown",
            "detail": "HTTP 503",
            "seconds": 0.012,
            "trace_id": TRACE_ID,
        },
        {
            "id": "planned-do-create_shipment",
            "at": None,
            "source": "plan",
            "event": "do",
            "step": "create_shipment",
            "attempt": None,
            "outcome": "planned",
            "detail": None,
            "seconds": None,
            "trace_id": None,
        },
    ],
    "why_stuck": {
        "message": "Payment failed charge_payment (attempt 2): no clear answer (HTTP 503). It is retried.",
        "waiting_for": "payment",
        "since": "2026-11-21T03:47:03.401020Z",
        "next_attempt_at": "2026-11-21T03:47:05.120000Z",
    },
}
EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "contentMediaType": "application/json", "description": "an entry of the timeline"},
        "event": {"type": "string", "description": "the source of the entry"},
        "id": {"type": "string", "description": "for `Last-Event-ID`"},
        "retry": {"type": "integer", "description": "milliseconds until a client may reconnect"},
    },
}
EVENTS = "event: saga\\ndata: {...an entry...}\\nid: 17.event-1.placed.publish-1.saga\\n\\n"


@router.get(
    "/orders/{order_id}/timeline",
    operation_id="getTimeline",
    summary="Read what has happened to an order, and what it waits for",
    responses={
        HTTPStatus.OK.value: openapi.response(TimelineAnswer, "The story so far", EXAMPLE, "Cache-Control"),
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
)
async def read_timeline(request: Request, response: Response, order_id: UUID) -> TimelineAnswer:
    """Return the order's story: request, outbox, broker, inbox, each call to a partner, operators, and its end.

    Then follow the steps that are still to come (`at` is null). `why_stuck` says what an overdue order waits for.
    """
    deps: OrdersDeps = request.state.orders
    tenant = (await authenticate_caller(request, "orders:read")).tenant
    response.headers.update(NO_STORE)
    return await timeline.read(deps.pool, order_id, tenant, deps.streams.consumer)


@router.get(
    "/orders/{order_id}/events",
    operation_id="followOrder",
    summary="Follow an order live, as server-sent events",
    response_class=Response,
    responses={
        HTTPStatus.OK.value: {
            "description": "Each entry of the timeline as it happens, until the final status",
            "content": {"text/event-stream": {"schema": EVENT, "example": EVENTS}},
            "headers": openapi.headers("Cache-Control"),
        },
        HTTPStatus.NO_CONTENT.value: {"description": "`Last-Event-ID` is that of the final status: do not reconnect"},
        **openapi.problems(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    openapi_extra={
        "parameters": [
            openapi.header_parameter(
                LAST_EVENT_ID,
                "The `id` of the last event that the client got: continue after it",
                "17.placed.saga",
                pattern=f"^({timeline.POSITION.pattern})?$",
            )
        ]
    },
)
async def follow(request: Request, order_id: UUID) -> Response:
    """Send what has happened, then what happens, as server-sent events; the stream ends with the final status.

    `data` is an entry of the timeline. A client that reconnects with `Last-Event-ID` misses nothing.
    """
    deps: OrdersDeps = request.state.orders
    tenant = (await authenticate_caller(request, "orders:read")).tenant
    position = _position(request)
    entries = await deps.streams.read(order_id, tenant)
    if position.is_at_end:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    if request.state.is_head:
        head = Response(headers=STREAM, media_type=EventSourceResponse.media_type)
        del head.headers["Content-Length"]  # a stream has none (RFC 9110, section 8.6)
        return head
    deps.streams.require_room(tenant)
    request.state.slot.release()  # it may take hours, and costs next to nothing
    request.state.is_stream = True
    return EventSourceResponse(deps.streams.follow(order_id, tenant, position, entries), headers=STREAM)


def _position(request: Request) -> Position:
    try:
        return Position.parse(request.headers.get(LAST_EVENT_ID) or "0")
    except ValueError as error:
        raise MalformedRequest(f"{LAST_EVENT_ID}: {error}") from error

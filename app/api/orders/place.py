"""Placing orders: `POST /orders`."""

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from fastapi import APIRouter, Request, Response

from app import db
from app.api import openapi
from app.api.body import Bodies
from app.api.orders.schemas import OrderAnswer, PlaceOrderRequest, order_json, read_place_order
from app.auth.guards import caller
from app.errors import OutboxFull
from app.idempotency import transaction
from app.idempotency.single_flight import HEADER, Idempotency
from app.idempotency.store import Answer
from app.messaging.backpressure import Backlog
from app.observability.metrics import Metrics
from app.observability.traces import trace_headers
from app.orders import store
from app.orders.model import Order

log = structlog.get_logger(__name__)
router = APIRouter(tags=["orders"])

KEY_PARAMETER = openapi.header_parameter(
    HEADER,
    'One and the same for every try of one write: `"abc"` or `abc`, 1–255 visible ASCII characters',
    "4c1f3b0e-7b6e-4f0c",
    **openapi.KEY_OR_BLANK_SCHEMA,
)


@dataclass(frozen=True, slots=True)
class Intake:
    """What the routes work with."""

    pool: db.Pool
    metrics: Metrics
    on_placed: Callable[[], None]
    on_cancelled: Callable[[], None]
    checkpoint: Callable[[str], None]
    idempotency: Idempotency
    backlog: Backlog
    bodies: Bodies


def render(order: Order) -> Answer:
    """Return the order as the answer to the request that placed it."""
    return Answer(HTTPStatus.CREATED, f"/orders/{order.id}", order_json(order))


@router.post(
    "/orders",
    operation_id="placeOrder",
    status_code=HTTPStatus.CREATED,
    summary="Place an order",
    response_model=OrderAnswer,
    responses=openapi.problems(*openapi.BODY_REFUSALS, HTTPStatus.CONFLICT),
    openapi_extra={"parameters": [KEY_PARAMETER], **openapi.request_body(PlaceOrderRequest)},
)
async def place(request: Request) -> Response:
    """Answer 201 once order and event are durable; with a known Idempotency-Key, the first answer again."""
    intake: Intake = request.state.intake
    sender = await caller(request, "orders:write")
    tenant = sender.tenant
    asked = read_place_order(await intake.bodies.read(request, sender.source))
    key = intake.idempotency.key(request, tenant, asked.normal_form())

    async def act(wait_seconds: float) -> Answer:
        try:
            intake.backlog.require_room()
        except OutboxFull:
            if key is None or (stored := await transaction.replay(intake.pool, key)) is None:
                raise
            return stored  # it takes no room
        return await store.place(
            intake.pool,
            asked.command(tenant),
            key,
            render,
            trace_headers(),
            ttl_seconds=intake.idempotency.ttl_seconds,
            wait_seconds=wait_seconds,
        )

    return _answered(intake, await intake.idempotency.answer(key, act))


def _answered(intake: Intake, answer: Answer) -> Response:
    headers = {"Location": answer.location}
    if answer.replayed:
        headers["Idempotent-Replay"] = "true"
    else:
        intake.checkpoint("intake.committed")
        intake.metrics.orders_placed.inc()
        intake.on_placed()
    log.info("order.replayed" if answer.replayed else "order.placed", order_id=answer.location.rpartition("/")[2])
    return Response(answer.body, answer.status, headers, media_type="application/json")

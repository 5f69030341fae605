"""Placing orders: `POST /orders`."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import APIRouter, Request, Response

from app import db
from app.api.idempotency import HEADER, Idempotency, checked
from app.api.schemas import (
    KeyAnswer,
    OrderAnswer,
    PlaceOrderRequest,
    Problem,
    order_json,
    read_place_order,
    self_contained_schema,
)
from app.api.security import caller
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
)
from app.messaging.backlog import Backlog
from app.orders import service
from app.orders.keys import Answer
from app.orders.models import Order, rfc3339
from app.telemetry import Metrics, trace_headers

log = structlog.get_logger(__name__)
router = APIRouter(tags=["orders"])

MAX_BODY_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024


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
    body_timeout_seconds: float


def render(order: Order) -> Answer:
    """Return the order as the answer to the request that placed it."""
    return Answer(HTTPStatus.CREATED, f"/orders/{order.id}", order_json(order))


def _problems(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    return {
        status.value: {
            "description": status.phrase,
            "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
        }
        for status in statuses
    }


@router.post(
    "/orders",
    status_code=HTTPStatus.CREATED,
    summary="Place an order",
    response_model=OrderAnswer,
    responses=_problems(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
    openapi_extra={
        "parameters": [
            {
                "name": HEADER,
                "in": "header",
                "required": False,
                "description": 'One and the same for every try of one order: `"abc"` or `abc`, 1–255 visible ASCII.',
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": self_contained_schema(PlaceOrderRequest)}},
        },
    },
)
async def place(request: Request) -> Response:
    """Answer 201 once order and event are durable; with a known Idempotency-Key, the first answer again."""
    intake: Intake = request.state.intake
    tenant = (await caller(request, "orders:write")).tenant
    asked = read_place_order(await _read_body(request, intake.body_timeout_seconds))
    key = intake.idempotency.key(request, tenant, asked.normal_form())

    async def act(wait_seconds: float) -> Answer:
        intake.backlog.require_room()
        return await service.place(
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


@router.get(
    "/idempotency-keys/{key:path}",
    summary="Read what an Idempotency-Key stands for",
    responses=_problems(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
)
async def read_what_a_key_stands_for(request: Request, key: str) -> KeyAnswer:
    """Return which answer the key's first request got; 404 does not prove that none is under way."""
    intake: Intake = request.state.intake
    tenant = (await caller(request, "orders:read")).tenant
    stored = await service.get_key(intake.pool, tenant, checked(key))
    return KeyAnswer(
        key=key,
        status_code=stored.answer.status,
        location=stored.answer.location,
        created_at=rfc3339(stored.created_at),
        expires_at=rfc3339(stored.expires_at),
    )


async def _read_body(request: Request, timeout_seconds: float) -> bytes:
    """Read the body, counting. Raises UnsupportedMediaType, BodyTooLarge, BodyTimeout."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    body += chunk
                # Read on for a while: closing on unread bytes resets the connection, and the client would see that
                # instead of the answer (RFC 9112, section 9.6).
                elif size > MAX_DISCARDED_BYTES:
                    break
    except TimeoutError as error:
        if size <= MAX_BODY_BYTES:
            raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} s") from error
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)

"""The routes that read one order, or one idempotency key.

An order is read conditionally (`If-None-Match`), and with `Prefer: wait=N` the answer waits until the order has ended.
"""

import asyncio
from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from app.api import openapi
from app.api.orders.deps import OrdersDeps
from app.api.orders.headers import none_match_fails, preferred_wait
from app.api.orders.schemas import OrderAnswer
from app.auth.guards import authenticate_caller
from app.idempotency.key import read_key
from app.orders import store
from app.orders.model import FINAL, Order, rfc3339

router = APIRouter(tags=["orders"])

MAX_WAIT_SECONDS = 30  # proxies between us and the caller commonly give up after 60
FORMAT = 1  # of the answer; increment it when the format changes, so that no cache keeps the old one
CACHING = {"Cache-Control": "private, no-cache", "Vary": "Prefer"}


class KeyAnswer(BaseModel):
    """The response that is stored under an Idempotency-Key, and how long it is kept."""

    key: str
    status_code: int
    location: str
    created_at: str
    expires_at: str


def etag(order: Order) -> str:
    """Return the order's strong entity tag, which differs for each version of the order and format of the answer."""
    return f'"{FORMAT}-{order.version}"'


@router.get(
    "/idempotency-keys/{key:path}",
    operation_id="getIdempotencyKey",
    summary="Read what is stored under an Idempotency-Key",
    responses=openapi.problems(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
async def read_key_record(
    request: Request, key: Annotated[str, Path(json_schema_extra={**openapi.KEY_SCHEMA})]
) -> KeyAnswer:
    """Return the response to the key's first request. A 404 does not prove that no request is in progress."""
    deps: OrdersDeps = request.state.orders
    tenant = (await authenticate_caller(request, "orders:read")).tenant
    name = read_key([key], required=True) or ""
    record = await deps.idempotency.find(tenant, name)
    return KeyAnswer(
        key=name,
        status_code=record.response.status,
        location=record.response.location,
        created_at=rfc3339(record.created_at),
        expires_at=rfc3339(record.expires_at),
    )


@router.get(
    "/orders/{order_id}",
    operation_id="getOrder",
    summary="Read an order",
    response_model=OrderAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(
            OrderAnswer, "The current order", openapi.ORDER, "ETag", *CACHING, "Preference-Applied"
        ),
        HTTPStatus.NOT_MODIFIED.value: {
            "description": "The caller already has this version",
            "headers": openapi.headers("ETag", *CACHING, "Preference-Applied"),
        },
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    openapi_extra={
        "parameters": [
            openapi.header_parameter(
                "If-None-Match", "The caller's ETags, or `*`: 304 if one of them is current", '"1-2"'
            ),
            openapi.header_parameter(
                "Prefer",
                f"`wait=N` (RFC 7240): wait for a final status, for N seconds (at most {MAX_WAIT_SECONDS})",
                "wait=5",
            ),
        ]
    },
)
async def read(request: Request, order_id: UUID) -> Response:
    """Return the order; with `Prefer: wait=N`, wait until it has ended or the time is up.

    `If-None-Match` is evaluated after the wait, against the order that would be returned.
    """
    deps: OrdersDeps = request.state.orders
    tenant = (await authenticate_caller(request, "orders:read")).tenant
    preferred_seconds = preferred_wait(request.headers.getlist("prefer"))
    if preferred_seconds is None:
        return _respond(request, await store.get(deps.pool, tenant, order_id), {})
    seconds = min(preferred_seconds, MAX_WAIT_SECONDS)
    order, could_wait = await _read_when_ended(request, deps, tenant, order_id, seconds)
    return _respond(request, order, {"Preference-Applied": f"wait={seconds}"} if could_wait else {})


def _respond(request: Request, order: Order, applied: dict[str, str]) -> Response:
    """Answer 200 or 304, with the same headers (RFC 9110, section 15.4.5); the server adds Date."""
    tag = etag(order)
    headers = {"ETag": tag, **CACHING, **applied}
    if none_match_fails(request.headers.getlist("if-none-match"), tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(order.json, headers=headers, media_type="application/json")


async def _read_when_ended(
    request: Request, deps: OrdersDeps, tenant: str, order_id: UUID, seconds: int
) -> tuple[Order, bool]:
    """Return the order when it has ended or after `seconds`, and whether the request could wait."""
    with deps.waiters.register(order_id) as ended:
        order = await store.get(deps.pool, tenant, order_id)
        if order.status in FINAL or not seconds:
            return order, True
        if ended is None:
            return order, False
        await _wait(request, ended, seconds)
    return await store.get(deps.pool, tenant, order_id), True


async def _wait(request: Request, ended: asyncio.Event, seconds: int) -> None:
    """Wait for the event, at most `seconds`. Raises ClientDisconnect when the client disconnects."""
    ended_task, disconnected = asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({ended_task, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if disconnected.done():
            disconnected.result()
            raise ClientDisconnect
    finally:
        ended_task.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # skip the body: a GET needs none

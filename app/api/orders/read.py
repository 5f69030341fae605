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
from app.api.orders.schemas import OrderAnswer, order_json
from app.auth.guards import caller
from app.idempotency.key import read_key
from app.orders import store
from app.orders.model import FINAL, Order, rfc3339

router = APIRouter(tags=["orders"])

MAX_WAIT_SECONDS = 30  # proxies between us and the caller commonly give up after 60
FORM = 1  # of the answer; to be raised with it, so that nobody goes on with a copy of the old form
CACHING = {"Cache-Control": "private, no-cache", "Vary": "Prefer"}


class KeyAnswer(BaseModel):
    """What an Idempotency-Key stands for, and for how long."""

    key: str
    status_code: int
    location: str
    created_at: str
    expires_at: str


def etag(order: Order) -> str:
    """Return the order's strong entity tag: another one for every version, and for every form of the answer."""
    return f'"{FORM}-{order.version}"'


@router.get(
    "/idempotency-keys/{key:path}",
    operation_id="getIdempotencyKey",
    summary="Read what an Idempotency-Key stands for",
    responses=openapi.problems(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
async def read_what_a_key_stands_for(
    request: Request, key: Annotated[str, Path(json_schema_extra={**openapi.KEY_SCHEMA})]
) -> KeyAnswer:
    """Return which answer the key's first request got; 404 does not prove that none is under way."""
    deps: OrdersDeps = request.state.orders
    tenant = (await caller(request, "orders:read")).tenant
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
        HTTPStatus.OK.value: openapi.answered(
            OrderAnswer, "The order as it is now", openapi.ORDER, "ETag", *CACHING, "Preference-Applied"
        ),
        HTTPStatus.NOT_MODIFIED.value: {
            "description": "The caller has this version already",
            "headers": openapi.headers("ETag", *CACHING, "Preference-Applied"),
        },
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    openapi_extra={
        "parameters": [
            openapi.header_parameter(
                "If-None-Match", "ETags that the caller has, or `*`: if one is the present one, 304", '"1-2"'
            ),
            openapi.header_parameter(
                "Prefer",
                f"`wait=N` (RFC 7240): answer when the status is final, or after N seconds, {MAX_WAIT_SECONDS} at most",
                "wait=5",
            ),
        ]
    },
)
async def read(request: Request, order_id: UUID) -> Response:
    """Return the order as it is now; with `Prefer: wait=N`, as it is when it has ended or the time is up.

    Waiting comes before `If-None-Match`: the condition is about the order as it is when the answer is given.
    """
    deps: OrdersDeps = request.state.orders
    tenant = (await caller(request, "orders:read")).tenant
    wished = preferred_wait(request.headers.getlist("prefer"))
    if wished is None:
        return _answered(request, await store.get(deps.pool, tenant, order_id), {})
    seconds = min(wished, MAX_WAIT_SECONDS)
    order, followed = await _read_when_ended(request, deps, tenant, order_id, seconds)
    return _answered(request, order, {"Preference-Applied": f"wait={seconds}"} if followed else {})


def _answered(request: Request, order: Order, applied: dict[str, str]) -> Response:
    """Answer 200 or 304, with the same headers (RFC 9110, section 15.4.5); the server adds Date."""
    tag = etag(order)
    headers = {"ETag": tag, **CACHING, **applied}
    if none_match_fails(request.headers.getlist("if-none-match"), tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(order_json(order), headers=headers, media_type="application/json")


async def _read_when_ended(
    request: Request, deps: OrdersDeps, tenant: str, order_id: UUID, seconds: int
) -> tuple[Order, bool]:
    """Return the order when it has ended or `seconds` are over, and whether there was a place to wait for that."""
    with deps.waiters.place(order_id) as ended:
        order = await store.get(deps.pool, tenant, order_id)
        if order.status in FINAL or not seconds:
            return order, True
        if ended is None:
            return order, False
        await _wait(request, ended, seconds)
    return await store.get(deps.pool, tenant, order_id), True


async def _wait(request: Request, ended: asyncio.Event, seconds: int) -> None:
    """Wait for the event, `seconds` at most. Raises ClientDisconnect when the client hangs up meanwhile."""
    ended_task, disconnected = asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait({ended_task, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if disconnected.done():
            disconnected.result()
            raise ClientDisconnect
    finally:
        ended_task.cancel()
        disconnected.cancel()


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # a body, which a GET has no use for

"""Reading orders: by page, and one: conditional, and held back until it ends where the caller prefers it."""

import asyncio
import json
from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from app.api import openapi
from app.api.orders.cursors import write_cursor
from app.api.orders.deps import OrdersDeps
from app.api.orders.headers import none_match_fails, preferred_wait
from app.api.orders.schemas import OrderAnswer, order_json
from app.api.params import ListOrders, read_query
from app.auth.guards import caller
from app.idempotency.key import read_key
from app.orders import queries as listings
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


class OrdersAnswer(BaseModel):
    """One page of a listing, newest first. `next_cursor`: null on the last page."""

    orders: list[OrderAnswer]
    next_cursor: str | None


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
    "/orders",
    operation_id="listOrders",
    summary="List orders",
    response_model=OrdersAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(OrdersAnswer, "One page, newest first", openapi.ORDERS, "Cache-Control"),
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    openapi_extra={"parameters": openapi.query_parameters(ListOrders)},
)
async def list_orders(request: Request) -> Response:
    """Return the caller's orders, newest first, `limit` at a time; `next_cursor` leads to the older ones.

    Going through the pages shows each order once at most, and leaves none out that was there at the start; those placed
    meanwhile are found by asking again without a cursor. A cursor goes with any filters.
    """
    deps: OrdersDeps = request.state.orders
    tenant = (await caller(request, "orders:read")).tenant
    query = read_query(ListOrders, request.query_params.multi_items())
    orders, following = await listings.page(deps.pool, query.listing(tenant))
    body = {
        "orders": [order.representation() for order in orders],
        "next_cursor": None if following is None else write_cursor(following),
    }
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, headers={"Cache-Control": CACHING["Cache-Control"]}, media_type="application/json")


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
    end, gone = asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({end, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            gone.result()
            raise ClientDisconnect
    finally:
        end.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # a body, which a GET has no use for

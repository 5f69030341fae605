"""The route `GET /orders`: a tenant's orders, by page."""

import json
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from app.api import openapi
from app.api.orders.cursors import PATTERN, read_cursor, write_cursor
from app.api.orders.deps import OrdersDeps
from app.api.orders.schemas import OrderAnswer
from app.api.params import DEFAULT_LIMIT, Instant, Limit, Name, StrictModel, refuse_repeated_names
from app.auth.guards import Caller, authenticate_caller
from app.orders import queries
from app.orders.model import Status
from app.orders.queries import Listing, Position

router = APIRouter(tags=["orders"])


def _parse_cursor(value: object) -> Position:
    return read_cursor(str(value))


Cursor = Annotated[Position, BeforeValidator(_parse_cursor), WithJsonSchema({"type": "string", "pattern": PATTERN})]
CustomerId = Annotated[
    Name, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[^\\u0000]+$"})
]


class ListOrders(StrictModel):
    """The query of `GET /orders`."""

    status: Annotated[Status, WithJsonSchema({"type": "string", "enum": list(Status)})] | None = Field(
        default=None, description="only orders of this status"
    )
    customer_id: CustomerId | None = Field(default=None, description="only this customer's orders")
    placed_after: Instant | None = Field(default=None, description="only orders placed later than this")
    placed_before: Instant | None = Field(default=None, description="only orders placed earlier than this")
    limit: Limit = Field(default=DEFAULT_LIMIT, description="orders in one answer")
    cursor: Cursor | None = Field(default=None, description="`next_cursor` of the previous answer: continue after it")

    def to_listing(self, tenant: str) -> Listing:
        """Translate into the query of a page."""
        return Listing(
            tenant=tenant,
            status=self.status,
            customer_id=self.customer_id,
            placed_after=self.placed_after,
            placed_before=self.placed_before,
            after=self.cursor,
            limit=self.limit,
        )


class OrdersAnswer(BaseModel):
    """One page of a listing, newest first. `next_cursor`: null on the last page."""

    orders: list[OrderAnswer]
    next_cursor: str | None


async def authenticate_reader(request: Request) -> Caller:
    """Return the caller, who may read orders. Raises the errors of `authenticate_caller`."""
    return await authenticate_caller(request, "orders:read")


@router.get(
    "/orders",
    operation_id="listOrders",
    summary="List orders",
    response_model=OrdersAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(OrdersAnswer, "One page, newest first", openapi.ORDERS, "Cache-Control"),
        **openapi.problems(HTTPStatus.UNPROCESSABLE_ENTITY),
    },
    # FastAPI runs these in this order, before it validates the query.
    dependencies=[Depends(authenticate_reader), Depends(refuse_repeated_names)],
)
async def list_orders(
    request: Request, sender: Annotated[Caller, Depends(authenticate_reader)], query: Annotated[ListOrders, Query()]
) -> Response:
    """Return the caller's orders, newest first, `limit` at a time; `next_cursor` leads to the older ones.

    Reading all pages returns each order at most once, and every order that existed when the first page was read; for
    orders placed meanwhile, start again without a cursor. A cursor can be combined with any filters.
    """
    deps: OrdersDeps = request.state.orders
    orders, next_position = await queries.page(deps.pool, query.to_listing(sender.tenant))
    body = {
        "orders": [order.representation() for order in orders],
        "next_cursor": None if next_position is None else write_cursor(next_position),
    }
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, headers={"Cache-Control": "private, no-cache"}, media_type="application/json")

"""The orders: find one by any id, list them by filters, newest first."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlencode

from fastapi import Query, Response
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from app.api.orders.cursors import write_cursor
from app.api.orders.listing import Cursor
from app.api.params import Instant, Name, StrictModel, refuse_repeated_names
from app.auth.guards import DEFAULT_TENANT
from app.console.route import Page, PageRequest, console_router, go_to
from app.errors import InsufficientScope
from app.operations import order_list, order_search
from app.operations.order_list import Attention, OrderFilter, OrderSummary, PageQuery
from app.operations.order_search import Kind
from app.orders.model import Status
from app.orders.queries import Position
from app.pages.feed import STREAM
from app.values import immutable

router = console_router()

ADDRESS = "/console/orders"
ORDERS_PER_PAGE = 50
MAX_SEARCH_CHARACTERS = 255  # an idempotency key has no more
LOCAL_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?")  # of an <input type="datetime-local">


def _complete_time(value: object) -> object:
    """Return what a browser sends for a date and time, which has no offset, as a time in UTC."""
    if isinstance(value, str) and (match := LOCAL_TIME.fullmatch(value)):
        return f"{value}{'' if match[1] else ':00'}Z"
    return value


def _refuse_unprintable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value.strip()


Moment = Annotated[Instant, BeforeValidator(_complete_time)]
SearchText = Annotated[str, Field(max_length=MAX_SEARCH_CHARACTERS), AfterValidator(_refuse_unprintable)]


class OrdersQuery(StrictModel):
    """The query of the page. An empty field, as a form sends it, is none."""

    q: SearchText = ""
    tenant: Name | None = None
    status: Status | None = None
    customer_id: Name | None = None
    placed_after: Moment | None = None
    placed_before: Moment | None = None
    stuck: Literal["1"] | None = None
    needs_operator: Literal["1"] | None = None
    older: Cursor | None = None
    newer: Cursor | None = None
    stream: Literal["1"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value or name not in cls.model_fields}

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.q and self.model_fields_set - {"q", "tenant", STREAM}:
            raise ValueError("a search has no filter but the tenant")
        for one, other in (("stuck", "needs_operator"), ("older", "newer")):
            if {one, other} <= self.model_fields_set:
                raise ValueError(f"{one} and {other} exclude each other")
        return self

    @property
    def attention(self) -> Attention | None:
        """Return the filter for orders that need attention."""
        if self.stuck:
            return Attention.STUCK
        return Attention.NEEDS_OPERATOR if self.needs_operator else None


@immutable
class Tab:
    """A link to a part of the orders."""

    name: str
    href: str
    is_current: bool


@router.get(ADDRESS)
async def show(page: Page, query: Annotated[OrdersQuery, Query()]) -> Response:
    """Show a page of orders, or those that a search found. A search that finds one order leads to it."""
    await refuse_repeated_names(page.request)
    if not page.viewer.is_operator and (query.tenant or query.attention):
        raise InsufficientScope(
            "only operators may use this filter: it needs the scope orders:operate", "orders:operate"
        )
    tenant = query.tenant if page.viewer.is_operator else page.viewer.tenant
    if query.q:
        return await _show_found(page, query, tenant)
    wanted = OrderFilter(
        tenant, query.status, query.customer_id, query.placed_after, query.placed_before, query.attention
    )
    given = _given(page)

    async def read() -> Mapping[str, Any]:
        position = PageQuery(ORDERS_PER_PAGE, query.older, query.newer)
        found = await order_list.read_page(page.ops.pool, wanted, position, page.ops.consumer)
        return {
            **_rows(found.orders, tenant),
            "older": _address(given, older=_cursor(found.older)) if found.older else None,
            "newer": _address(given, newer=_cursor(found.newer)) if found.newer else None,
            "is_complete": found.is_complete,
            "empty": _say_nothing_listed(query),
        }

    return await page.show("orders.html", read, **_around(page, query))


async def _show_found(page: PageRequest, query: OrdersQuery, tenant: str | None) -> Response:
    found = await order_search.search(page.ops.pool, query.q, tenant)
    order_ids = list(found.orders)[:ORDERS_PER_PAGE]
    if len(found.orders) == 1 and not page.wants_stream:
        return go_to(f"{ADDRESS}/{order_ids[0]}")
    kinds = {str(order_id): ", ".join(kinds) for order_id, kinds in found.orders.items()}

    async def read() -> Mapping[str, Any]:
        orders = await order_list.read_orders(page.ops.pool, order_ids, page.ops.consumer)
        return {
            **_rows(orders, tenant),
            "found_as": kinds,
            "older": None,
            "newer": None,
            "is_complete": found.is_complete,
            "is_cut": found.is_cut or len(found.orders) > len(order_ids),
            "empty": "Nothing found in the orders of " + ("all tenants" if tenant is None else f"the tenant {tenant}"),
            "looked_for": found.looked_for,
            "of_customer": _address({} if query.tenant is None else {"tenant": query.tenant}, customer_id=query.q)
            if any(Kind.CUSTOMER in kinds for kinds in found.orders.values())
            else None,
        }

    return await page.show("orders.html", read, **_around(page, query))


def _rows(orders: Sequence[OrderSummary], tenant: str | None) -> dict[str, Any]:
    """Return what the rows show, in a list and after a search."""
    shows_tenant = tenant is None and any(order.tenant != DEFAULT_TENANT for order in orders)
    return {
        "orders": orders,
        "shows_tenant": shows_tenant,
        "most_tenants": order_list.MAX_TENANTS,
        "is_cut": False,
        "found_as": {},
        "looked_for": (),
        "of_customer": None,
    }


def _around(page: PageRequest, query: OrdersQuery) -> dict[str, Any]:
    """Return what stands around the rows: the search, the tabs, the filters."""
    given = _given(page)
    kept = {name: value for name, value in given.items() if name not in {"status", "stuck", "needs_operator", "q"}}
    tabs = [Tab("All", _address(kept), not (query.status or query.attention or query.q))]
    tabs += [
        Tab(status.capitalize(), _address(kept, status=status), query.status is status and query.attention is None)
        for status in Status
    ]
    if page.viewer.is_operator:
        tabs.append(Tab("Stuck", _address(kept, stuck="1"), query.attention is Attention.STUCK))
        needs_operator = query.attention is Attention.NEEDS_OPERATOR
        tabs.append(Tab("Needs an operator", _address(kept, needs_operator="1"), needs_operator))
    narrowing = {"tenant", "customer_id", "placed_after", "placed_before"}
    return {
        "q": query.q,
        "values": {
            "status": given.get("status", ""),
            "stuck": query.stuck or "",
            "needs_operator": query.needs_operator or "",
            "tenant": query.tenant or "",
            "customer_id": query.customer_id or "",
            "placed_after": _as_local_time(query.placed_after),
            "placed_before": _as_local_time(query.placed_before),
        },
        "tabs": tabs,
        "is_narrowed": bool(narrowing & given.keys()),
        "without_filters": _address({name: value for name, value in given.items() if name not in narrowing}),
    }


def _given(page: PageRequest) -> dict[str, str]:
    """Return the filters of the page's address, as they were written."""
    leaving = {STREAM, "older", "newer"}
    return {name: value for name, value in page.request.query_params.items() if value and name not in leaving}


def _as_local_time(instant: datetime | None) -> str:
    """Return the instant as an <input type="datetime-local"> shows it."""
    return f"{instant:%Y-%m-%dT%H:%M:%S}" if instant else ""


def _address(given: Mapping[str, str], **more: str) -> str:
    query = urlencode({**given, **more})
    return f"{ADDRESS}?{query}" if query else ADDRESS


def _cursor(position: Position) -> str:
    return write_cursor(position)


def _say_nothing_listed(query: OrdersQuery) -> str:
    if query.attention is Attention.STUCK:
        return "No order is stuck"
    if query.attention is Attention.NEEDS_OPERATOR:
        return "No order needs an operator"
    has_filter = query.model_fields_set - {STREAM}
    return "No order matches these filters" if has_filter else "There are no orders yet"

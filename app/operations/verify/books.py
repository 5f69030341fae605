"""Read what the partners have for orders: from their ledgers, in pages beside the orders, or by asking for each order.

A partner with a ledger (the sandbox) shows sums and moves, also of sagas that are no order of this service. Of a
partner without one, the query calls show the state of each order, but no amount and no second move.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Protocol

from app.errors import PartnerUnavailable
from app.operations.verify.snapshot import OrderFacts
from app.partners.ledger import LedgerClient
from app.partners.ports import ChargeRequest, InventoryQuery, PaymentQuery, ShippingQuery, Unknown
from app.values import immutable

LEDGER_PAGE = 500
QUERIES_AT_ONCE = 16

Query = Callable[[OrderFacts], Awaitable[str | Unknown | None]]


@immutable
class PartnerRecord:
    """What one partner has for a saga. None: it does not say.

    `state`: the answer to a query call, `absent` if it never saw the saga. The other fields come from a ledger.
    """

    state: str | None = None
    charged_minor: int | None = None
    refunded_minor: int | None = None
    held: bool | None = None
    committed: bool | None = None
    shipped: bool | None = None
    moves: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, int] | None = None


NOTHING = PartnerRecord(
    charged_minor=0, refunded_minor=0, held=False, committed=False, shipped=False, items={}
)  # in a ledger that has no entry of the saga


class Book(Protocol):
    """One source of what partners have. `partners`: the partners that it speaks for."""

    partners: frozenset[str]
    has_ledger: bool

    async def read(self, orders: Sequence[OrderFacts]) -> Mapping[str, PartnerRecord]:
        """Return the records of these orders, by id. Raises PartnerUnavailable."""


class LedgerBook:
    """The records of one ledger, which may be that of several partners."""

    has_ledger = True

    def __init__(self, client: LedgerClient, partners: frozenset[str], page_size: int = LEDGER_PAGE) -> None:
        self.client = client
        self.partners = partners
        self._page_size = page_size

    async def walk(self, after: str, end: str | None) -> AsyncIterator[Mapping[str, PartnerRecord]]:
        """Yield pages of the sagas with ids greater than `after`, up to `end`. Raises PartnerUnavailable."""
        while page := await self.client.read_sagas(after, self._page_size):
            last = max(page)
            if last <= after:
                raise PartnerUnavailable("the ledger does not page by saga id")
            yield {saga_id: _parse(row) for saga_id, row in page.items() if end is None or saga_id <= end}
            if len(page) < self._page_size or (end is not None and last > end):
                return
            after = last

    async def walk_stock(self) -> AsyncIterator[Mapping[str, Mapping[str, int]]]:
        """Yield pages of the items that were ever moved or set. Raises PartnerUnavailable."""
        after = ""
        while page := await self.client.read_stock(after, self._page_size):
            yield page
            if len(page) < self._page_size or (last := max(page)) <= after:
                return
            after = last

    async def read(self, orders: Sequence[OrderFacts]) -> Mapping[str, PartnerRecord]:
        """Ask for each saga by itself."""
        return await self.read_ids([str(order.id) for order in orders])

    async def read_ids(self, ids: Sequence[str]) -> Mapping[str, PartnerRecord]:
        """Ask for each saga by its id."""
        limit = asyncio.Semaphore(QUERIES_AT_ONCE)

        async def one(saga_id: str) -> PartnerRecord:
            async with limit:
                row = await self.client.read_saga(saga_id)
            return NOTHING if row is None else _parse(row)

        return dict(zip(ids, await gather_all(one(saga_id) for saga_id in ids), strict=True))


class QueryBook:
    """The answers of one partner's query calls."""

    has_ledger = False

    def __init__(self, partner: str, query: Query) -> None:
        self.partners = frozenset({partner})
        self._query = query

    async def read(self, orders: Sequence[OrderFacts]) -> Mapping[str, PartnerRecord]:
        """Ask for the final ones of these orders."""
        limit = asyncio.Semaphore(QUERIES_AT_ONCE)

        async def one(order: OrderFacts) -> PartnerRecord:
            async with limit:
                state = await self._query(order)
            if isinstance(state, Unknown):
                raise PartnerUnavailable(f"a query call was not answered: {state.detail}")
            return PartnerRecord(state=state or "absent")

        final = [order for order in orders if order.is_final]
        records = await gather_all(one(order) for order in final)
        return {str(order.id): record for order, record in zip(final, records, strict=True)}


async def gather_all(calls: Any) -> list[Any]:
    """Run calls at once. If one fails, cancel the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except* PartnerUnavailable as errors:
        raise PartnerUnavailable(str(errors.exceptions[0])) from errors
    return [task.result() for task in tasks]


def query_inventory(port: InventoryQuery) -> Query:
    """Return the query call of the inventory partner."""
    return lambda order: port.state(order.id)


def query_payment(port: PaymentQuery) -> Query:
    """Return the query call of the payment partner."""
    return lambda order: port.state_of(
        ChargeRequest(
            order.id,
            order.total_minor,
            order.currency,
            order.payment_method,
            order.started_at or order.placed_at,
            order.payment_id,
        )
    )


def query_shipping(port: ShippingQuery) -> Query:
    """Return the query call of the shipping partner."""
    return lambda order: port.state(order.id)


def _parse(row: Mapping[str, Any]) -> PartnerRecord:
    try:
        return PartnerRecord(
            charged_minor=int(row["charged_minor"]),
            refunded_minor=int(row["refunded_minor"]),
            held=bool(row["held"]),
            committed=bool(row["committed"]),
            shipped=bool(row["shipped"]),
            moves=row.get("moves", {}),
            items=row.get("items"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PartnerUnavailable("the ledger's sums cannot be read") from error

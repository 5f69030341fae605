"""What the page shows: each part is read by itself and in a bounded time, and says so when it is not current."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from math import ceil
from typing import Any, Generic, TypeVar

import structlog

from app import db
from app.auth.guards import DEFAULT_TENANT
from app.demo.children import Child, ChildState
from app.demo.playground.actions import PARTNER_FAULTS
from app.demo.playground.customers import Customers
from app.demo.playground.events import Events
from app.demo.playground.invariants import Invariants
from app.demo.playground.partners import Ledger, Partners, Rule
from app.errors import DatabaseUnavailable, Unavailable
from app.operations.tally import OrderTally, Tally
from app.orders import queries
from app.orders.model import Status
from app.orders.queries import Listing
from app.values import immutable

log = structlog.get_logger(__name__)

READ_SECONDS = 1.5
SHOWN_ORDERS = 10

T = TypeVar("T")


class Source(Generic[T]):
    """A part of the page. `value`: what was read last; `problem`: why that is not current."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self.value: T | None = None
        self.problem = ""
        self._read = read

    async def refresh(self) -> None:
        """Read it, within READ_SECONDS."""
        try:
            async with asyncio.timeout(READ_SECONDS):
                self.value = await self._read()
            self.problem = ""
        except DatabaseUnavailable:
            self.problem = "PostgreSQL does not answer"
        except Unavailable as error:
            self.problem = str(error)
        except TimeoutError:
            self.problem = f"no answer within {READ_SECONDS:g} s"
        except Exception:
            self.problem = "it could not be read; the terminal shows the error"
            log.exception("playground.reading_failed")


@immutable
class ActiveFault:
    """A fault of the partners. `name`: that of its button; empty if it was set in another way."""

    name: str
    label: str
    remaining: int | None


class Balance(StrEnum):
    """Whether the partners' ledger fits the orders."""

    BALANCED = "balanced"
    IN_PROGRESS = "in progress"
    NOT_BALANCED = "not balanced"


@immutable
class Books:
    """The partners' ledger beside the orders."""

    ledger: Ledger
    tally: Tally
    balance: Balance


class State:
    """Reads everything that the page shows."""

    def __init__(
        self,
        children: Sequence[Child],
        pool: db.Pool,
        partners: Partners,
        customers: Customers,
        invariants: Invariants,
        events: Events,
    ) -> None:
        self._children = children
        self._pool = pool
        self._partners = partners
        self._customers = customers
        self._invariants = invariants
        self._events = events
        self._tally = OrderTally()
        self._reading = asyncio.Lock()
        self._orders = Source(self._read_orders)
        self._books = Source(self._read_books)
        self._faults = Source(self._read_faults)

    async def read(self) -> Mapping[str, Any]:
        """Return what the fragments show."""
        self._invariants.keep_fresh()
        async with self._reading:
            await asyncio.gather(*(source.refresh() for source in (self._orders, self._books, self._faults)))
        return {
            "children": [{"child": child, "note": describe(child)} for child in self._children],
            "orders": self._orders,
            "books": self._books,
            "faults": self._faults,
            "waiting": self._customers.waiting,
            "invariants": self._invariants,
            "events": list(self._events),
        }

    async def _read_orders(self) -> Sequence[Mapping[str, Any]]:
        orders, _ = await queries.page(self._pool, Listing(DEFAULT_TENANT, SHOWN_ORDERS))
        return [order.representation() for order in orders]

    async def _read_books(self) -> Books:
        before = await self._tally.read(self._pool)
        ledger = await self._partners.read_ledger()
        after = await self._tally.read(self._pool)
        return Books(ledger, after, _judge(before, ledger, after))

    async def _read_faults(self) -> list[ActiveFault]:
        return name_faults(await self._partners.read_faults())


def format_money(minor: int) -> str:
    """Return an amount of a currency with two decimals: `1 234.50`."""
    return f"{minor / 100:,.2f}".replace(",", "\u202f")


def describe(child: Child) -> str:
    """Say what a child is doing, or when it will be back."""
    seconds = ceil(child.seconds_away)
    match child.state:
        case ChildState.FROZEN:
            return f"continues in {seconds} s"
        case ChildState.DOWN:
            return f"back in {seconds} s" if seconds else "will be started again at once"
        case ChildState.STARTING:
            return "is starting"
        case ChildState.RUNNING:
            return f"process {child.pid}"


def _judge(before: Tally, ledger: Ledger, after: Tally) -> Balance:
    """Compare ledger and orders. While an order is between its calls, they need not be equal yet."""
    if after.unfinished or before != after:
        return Balance.IN_PROGRESS
    fits = (
        ledger.charged_minor - ledger.refunded_minor == after.confirmed_minor
        and ledger.shipped == after.count(Status.CONFIRMED)
        and not ledger.stock.held
        and ledger.stock.is_conserved
    )
    return Balance.BALANCED if fits else Balance.NOT_BALANCED


def name_faults(rules: Sequence[Rule]) -> list[ActiveFault]:
    """Return the faults that these rules are, each once, with the name and the label of their buttons."""
    buttons = {(rule["target"], rule["kind"]): fault for fault in PARTNER_FAULTS for rule in fault.rules}
    active: dict[str, ActiveFault] = {}
    for rule in rules:
        fault = buttons.get((rule["target"], rule["kind"]))
        name, label = (fault.name, fault.label) if fault else ("", f"{rule['target']}: {rule['kind']}")
        before = active.get(label)
        remaining = rule["times"]
        if before is not None and remaining is not None:
            remaining = None if before.remaining is None else remaining + before.remaining
        active[label] = ActiveFault(name, label, remaining)
    return list(active.values())

"""Judge final orders by what the partners have: I5 (money) and I7 (stock and parcels). Pure."""

from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

from app.operations.verify.books import PartnerRecord
from app.operations.verify.findings import Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts
from app.orders import money
from app.orders.model import Status

# The states that the query calls may show: of a confirmed order, and of any other final one.
CONFIRMED_STATES = {"payment": {"charged"}, "inventory": {"committed"}, "shipping": {"created"}}
UNDONE_STATES = {
    "payment": {"absent", "declined", "refunded"},
    "inventory": {"absent", "released", "expired"},
    "shipping": {"absent", "refused", "cancelled"},
}


def judge_cancel(order: OrderFacts) -> Iterator[Suspicion]:
    """Judge whether an order was confirmed although its cancel was accepted."""
    if order.status is Status.CONFIRMED and order.cancel_requested_at is not None:
        yield _suspect(Invariant.I5, order, "it is confirmed although its cancel was accepted")


def judge(order: OrderFacts, partner: str, record: PartnerRecord) -> Iterator[Suspicion]:
    """Judge a final order by the record of one partner."""
    confirmed = order.status is Status.CONFIRMED
    invariant = Invariant.I5 if partner == "payment" else Invariant.I7
    if record.state is not None:
        expected = (CONFIRMED_STATES if confirmed else UNDONE_STATES)[partner]
        if record.state not in expected:
            yield _suspect(invariant, order, f"it is {order.status}, and {partner} says {record.state}")
    elif partner == "payment":
        yield from _judge_money(order, record, due=order.total_minor if confirmed else 0)
    elif partner == "inventory":
        yield from _judge_stock(order, record, confirmed=confirmed)
    elif record.shipped != confirmed:
        yield _suspect(
            invariant, order, f"it is {order.status}, and {'has a' if record.shipped else 'has no'} shipment"
        )


def adds_up(stock: Mapping[str, int]) -> bool:
    """Return whether the stock of an item is all that was ever put on its shelf."""
    return stock["free"] + stock["held"] + stock["sold"] == stock["supplied"]


def judge_shelf(item: str, stock: Mapping[str, int], orders: Sequence[UUID]) -> Suspicion:
    """Report an item whose stock does not add up. `orders`: the newest ones that contain it."""
    names = tuple(str(order_id) for order_id in orders)
    problem = f"free {stock['free']} + held {stock['held']} + sold {stock['sold']} is not {stock['supplied']}"
    note = f"; its newest orders: {', '.join(names)}" if names else ""
    return Suspicion(Invariant.I7, f"item: {item}", problem + note, orders=names)


def _judge_money(order: OrderFacts, record: PartnerRecord, due: int) -> Iterator[Suspicion]:
    charged_minor, refunded_minor = record.charged_minor or 0, record.refunded_minor or 0
    if charged_minor - refunded_minor != due:
        amounts = (charged_minor, refunded_minor, due)
        charged, refunded, owed = (money.from_minor(amount, order.currency) for amount in amounts)
        problem = f"it is {order.status}: charged {charged}, refunded {refunded}, due {owed} {order.currency}"
        yield _suspect(Invariant.I5, order, problem)
    live = record.moves.get("payment.charge", 0) - record.moves.get("payment.refund", 0)
    if live > 1:
        yield _suspect(Invariant.I5, order, f"it has {live} live charges")


def _judge_stock(order: OrderFacts, record: PartnerRecord, *, confirmed: bool) -> Iterator[Suspicion]:
    if record.held:
        yield _suspect(Invariant.I7, order, f"it is {order.status}, and its stock is still held")
    elif record.committed != confirmed:
        yield _suspect(
            Invariant.I7, order, f"it is {order.status}, and its stock is {'' if record.committed else 'not '}sold"
        )
    elif confirmed and record.items is not None and record.items != order.items:
        yield _suspect(Invariant.I7, order, f"it has {dict(order.items)}, and {dict(record.items)} was sold for it")


def _suspect(invariant: Invariant, order: OrderFacts, problem: str) -> Suspicion:
    return Suspicion(invariant, str(order.id), problem, order.changed_at)

"""Judge what the tables say about one order by themselves: I1 (durable), I9 (one tenant). Pure."""

from collections.abc import Iterator
from datetime import datetime

from app.operations.verify.findings import Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts
from app.orders import money
from app.orders.events import TYPES


def judge(order: OrderFacts, kept_since: datetime) -> Iterator[Suspicion]:
    """Judge one order. `kept_since`: retention has removed no event that is newer."""
    for invariant, problem in (*_durable(order, kept_since), *_tenants(order)):
        yield Suspicion(invariant, str(order.id), problem, order.changed_at)


def expects_events(order: OrderFacts, kept_since: datetime) -> bool:
    """Return whether the outbox must still have the events of the order. Those of unfinished orders always stay."""
    return not order.is_final or order.placed_at > kept_since


def _durable(order: OrderFacts, kept_since: datetime) -> Iterator[tuple[Invariant, str]]:
    if order.lines_total_minor != order.total_minor:
        lines, total = (
            money.from_minor(amount, order.currency) for amount in (order.lines_total_minor, order.total_minor)
        )
        yield Invariant.I1, f"its lines add up to {lines}, its total is {total} {order.currency}"
    if expects_events(order, kept_since) and not order.has_placed:
        yield Invariant.I1, "the outbox has no order.placed of it"
    elif order.is_final and order.updated_at > kept_since and order.last_type != TYPES[order.status]:
        yield Invariant.I1, f"it is {order.status}, and the outbox has no event for that"


def _tenants(order: OrderFacts) -> Iterator[tuple[Invariant, str]]:
    others = {order.placed_tenant, order.last_tenant} - {None, order.tenant}
    if others:
        yield (
            Invariant.I9,
            f"it is of tenant {order.tenant}, an event of it is of {', '.join(sorted(map(str, others)))}",
        )

"""Judge the events of one order: I3 (published means confirmed). Pure.

The broker keeps no list of what it confirmed. An `order.placed` that it confirmed and that took no effect, long after
the resender should have sent it again, was never sent, or is lost: nothing waits for it any more.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta

from app.operations.verify.findings import Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts
from app.orders.model import Status

LOST = "its order.placed is marked published, and was never handled"
LOST_AFTER = timedelta(seconds=120)  # the resender waits for 60 s, and looks every 10 s


def judge(order: OrderFacts) -> Iterator[Suspicion]:
    """Judge the rows of one order, apart from `is_lost`."""
    for problem in _problems(order):
        yield Suspicion(Invariant.I3, str(order.id), problem, order.changed_at)


def is_lost(order: OrderFacts, now: datetime) -> bool:
    """Return whether its `order.placed` is published, and had no effect and no failure since."""
    return (
        order.status is Status.PENDING
        and not order.has_saga
        and not order.was_delivered
        and order.published_at is not None
        and order.published_at + LOST_AFTER * 2 ** min(order.resends or 0, 20) < now
    )


def _problems(order: OrderFacts) -> Iterator[str]:
    if order.published_at is not None and order.parked_at is not None:
        yield "its order.placed is marked published and parked"
    if order.parked_at is not None and not order.last_error:
        yield "its order.placed is parked without a reason"
    if order.placed_sequence not in (None, 1):
        yield f"its order.placed has the sequence {order.placed_sequence}"

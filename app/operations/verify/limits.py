"""Judge bounds: I8, as far as the rows of a running system show it. Pure.

Requests and memory are bounded inside each process, which the tests prove. In the tables, a bound that does not work
shows as a row that waits for longer than any pause that the service ever makes, or as more changes than an order has.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta

from app.operations.verify.findings import Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts

MAX_VERSION = 3  # placed, compensating, ended
LONGEST_PAUSE = timedelta(hours=1)  # with the default settings the longest is 5 min: backoff, lease or Retry-After


def judge(order: OrderFacts, now: datetime) -> Iterator[Suspicion]:
    """Judge the waits of one order."""
    for problem in _problems(order, now):
        yield Suspicion(Invariant.I8, str(order.id), problem, order.changed_at)


def _problems(order: OrderFacts, now: datetime) -> Iterator[str]:
    if order.version > MAX_VERSION:
        yield f"it changed {order.version} times, an order changes {MAX_VERSION} times at most"
    saga_due = order.saga_next_attempt_at if order.finished_at is None else None
    if saga_due is not None and saga_due > now + LONGEST_PAUSE:
        yield f"its saga waits until {saga_due.isoformat()}"
    waits = order.published_at is None and order.parked_at is None
    if waits and order.placed_next_attempt_at is not None and order.placed_next_attempt_at > now + LONGEST_PAUSE:
        yield f"its order.placed waits until {order.placed_next_attempt_at.isoformat()}"

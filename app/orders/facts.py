"""Facts about orders, and their metrics."""

from uuid import UUID

from prometheus_client import CollectorRegistry, Counter

from app.observability.signals import Fact, Signals
from app.orders.model import Reason, Status
from app.values import immutable

FINISHED = (
    (Status.CONFIRMED, ""),
    *((Status.REJECTED, reason) for reason in Reason if reason is not Reason.CANCELLED_BY_CUSTOMER),
    *((Status.CANCELLED, reason) for reason in (Reason.CANCELLED_BY_CUSTOMER, Reason.COMPENSATED_BY_OPERATOR)),
)


@immutable
class OrderPlaced(Fact):
    """An order and its event are committed. `order_id`: as text, as in the order's address."""

    level = "info"
    event = "order.placed"
    order_id: str


@immutable
class CancelAccepted(Fact):
    """A cancel is committed: the order will never be confirmed. `status`: of the HTTP response."""

    level = "info"
    event = "order.cancelled"
    order_id: UUID
    status: int


@immutable
class OrderFinished(Fact):
    """An order's final status is committed."""

    order_id: UUID
    status: Status
    reason: Reason | None


def install_metrics(signals: Signals, registry: CollectorRegistry) -> None:
    """Create the metrics, every series at zero, and subscribe them."""
    placed = Counter("orders_placed", "Orders accepted", registry=registry)
    finished = Counter("orders_finished", "Orders that this process finished", ["status", "reason"], registry=registry)
    for status, reason in FINISHED:
        finished.labels(status, reason)
    signals.subscribe(OrderPlaced, lambda _: placed.inc())
    signals.subscribe(OrderFinished, lambda fact: finished.labels(fact.status, fact.reason or "").inc())

"""The events that an order publishes, named in the past tense. Each is built from the order alone."""

from collections.abc import Mapping

from uuid_utils.compat import uuid7

from app.messaging.envelope import Envelope, JsonText
from app.orders.model import Order, Status

PLACED = "orders.order.placed.v1"

TYPES: Mapping[Status, str] = {
    Status.PENDING: PLACED,
    Status.CONFIRMED: "orders.order.confirmed.v1",
    Status.REJECTED: "orders.order.rejected.v1",
    Status.CANCELLED: "orders.order.cancelled.v1",
}


def event_for(order: Order, trace: Mapping[str, str]) -> Envelope | None:
    """Return the event for the order's present status, None for COMPENSATING, which is internal.

    `order.placed` happens once per order, so it has the order's own id. That saves an index from orders to events.
    """
    event_type = TYPES.get(order.status)
    if event_type is None:
        return None
    return Envelope(
        id=order.id if order.status is Status.PENDING else uuid7(),
        type=event_type,
        subject=str(order.id),
        sequence=order.version,
        tenant=order.tenant,
        time=order.updated_at,
        data=JsonText(order.json),
        traceparent=trace.get("traceparent"),
        tracestate=trace.get("tracestate"),
    )

"""Cancelling an order, for its customer or by an operator: at once while no saga has started, else a word for the saga.

The order's row decides. Starting the saga, cancelling, and the saga's last step forward (the transaction that records
the shipment and `confirmed`) all lock it first, so each sees what the others committed:

- cancelled before the start: the order ends here, and the consumer starts no saga for it;
- started before the cancel: the request is on record, and no transaction confirms the order any more. The runner learns
  of it with its next record, a saga in a pause becomes due at once, and everything that was attempted is undone;
- confirmed before the cancel: too late.

Locks are taken in one order everywhere: key, order, saga, outbox.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from app import db
from app.errors import OrderNotCancellable, OrderNotFound
from app.orders import store as order_store
from app.orders.model import Order, Reason, Status
from app.saga import store


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a cancel came to: the order as it is now, and whether this cancel changed it."""

    order: Order
    changed: bool = False

    @property
    def ended_now(self) -> bool:
        """Whether it was this cancel that ended the order."""
        return self.changed and self.order.status is Status.CANCELLED


async def cancel(conn: db.Connection, tenant: str, order_id: UUID, trace: Mapping[str, str]) -> Cancelled:
    """Cancel the customer's order in the caller's transaction; after its commit the order never becomes confirmed.

    CANCELLED in the answer: it has ended. PENDING or COMPENSATING: its saga turns back. Doing it again changes nothing.
    Raises OrderNotFound (for another tenant's order too) and OrderNotCancellable (it was confirmed or rejected before).
    """
    order = await order_store.load(conn, order_id, lock=True)
    if order is None or order.tenant != tenant:
        raise OrderNotFound(f"there is no order {order_id}")
    return await cancel_locked(conn, order, Reason.CANCELLED_BY_CUSTOMER, trace)


async def cancel_locked(conn: db.Connection, order: Order, reason: Reason, trace: Mapping[str, str]) -> Cancelled:
    """Cancel, for this reason, an order that the caller has locked. Raises OrderNotCancellable."""
    match order.status:
        case Status.REJECTED if order.status_reason is reason:
            return Cancelled(order)  # rejected by such a cancel: an operator's
        case Status.CONFIRMED | Status.REJECTED:
            raise OrderNotCancellable(f"the order is {order.status}")
        case Status.COMPENSATING | Status.CANCELLED:
            return Cancelled(order)
        case Status.PENDING:
            if await store.wake_if_waiting(conn, order.id):
                asked = await order_store.request_cancel(conn, order, reason)
                return Cancelled(asked, changed=asked is not order)
            ended = await order_store.change_status(conn, order, Status.CANCELLED, reason, trace)
            return Cancelled(ended, changed=True)

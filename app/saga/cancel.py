"""Cancel an order for its customer or an operator: at once if its saga has not started, otherwise through the saga.

The order's row decides. Three transactions lock it first, so each sees what the others committed: starting the saga,
cancelling, and recording the saga's last step (which also records `confirmed`).

- Cancelled before the start: the order ends here, and the consumer starts no saga for it.
- Started before the cancel: the request is recorded, and from then on no transaction confirms the order. The runner
  sees the request with its next write, a waiting saga becomes due at once, and every attempted step is undone.
- Confirmed before the cancel: the cancel is refused.

Locks are taken in one order everywhere: key, order, saga, outbox.
"""

from collections.abc import Mapping
from uuid import UUID

from app import db
from app.errors import OrderNotCancellable, OrderNotFound
from app.orders import store as order_store
from app.orders.model import Order, Reason, Status
from app.saga import store
from app.values import immutable


@immutable
class Cancelled:
    """The result of a cancel: the order as it is now, and whether this cancel changed it."""

    order: Order
    changed: bool = False

    @property
    def ended_now(self) -> bool:
        """Return whether this cancel ended the order."""
        return self.changed and self.order.status is Status.CANCELLED


async def cancel(conn: db.Connection, tenant: str, order_id: UUID, trace: Mapping[str, str]) -> Cancelled:
    """Cancel the customer's order in the caller's transaction. After its commit the order never becomes confirmed.

    If the returned order is CANCELLED, it has ended; if it is PENDING or COMPENSATING, its saga compensates. A repeated
    cancel changes nothing. Raises OrderNotFound (also for another tenant's order) and OrderNotCancellable (the order
    was confirmed or rejected before).
    """
    order = await order_store.load(conn, order_id, lock=True)
    if order is None or order.tenant != tenant:
        raise OrderNotFound(f"there is no order {order_id}")
    return await cancel_locked(conn, order, Reason.CANCELLED_BY_CUSTOMER, trace)


async def cancel_locked(conn: db.Connection, order: Order, reason: Reason, trace: Mapping[str, str]) -> Cancelled:
    """Cancel an order that the caller has locked. Raises OrderNotCancellable."""
    match order.status:
        case Status.REJECTED if order.status_reason is reason:
            return Cancelled(order)  # by an earlier cancel of an operator
        case Status.CONFIRMED | Status.REJECTED:
            raise OrderNotCancellable(f"the order is {order.status}")
        case Status.COMPENSATING | Status.CANCELLED:
            return Cancelled(order)
        case Status.PENDING:
            if await store.wake_if_waiting(conn, order.id):
                requested = await order_store.request_cancel(conn, order, reason)
                return Cancelled(requested, changed=requested is not order)
            ended = await order_store.change_status(conn, order, Status.CANCELLED, reason, trace)
            return Cancelled(ended, changed=True)

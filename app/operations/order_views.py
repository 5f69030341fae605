"""One order with everything that a page shows of it, read in one snapshot, and what an operator can do about it now."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from uuid import UUID

from app import db
from app.errors import OrderNotFound
from app.operations import timeline
from app.operations.timeline import TimelineAnswer
from app.operations.why_stuck import Situation
from app.orders import store
from app.orders.model import Order, Status
from app.saga import queries
from app.values import immutable


class OrderAction(StrEnum):
    """What an operator can do about one order. The first three are those of `sagas.SagaAction`."""

    RETRY = "retry"
    COMPENSATE = "compensate"
    CANCEL = "cancel"
    REQUEUE = "requeue"  # its parked event
    REPLAY = "replay"  # its dead letter


@immutable
class OrderView:
    """An order. `partner_ids`: those that partners gave, by name. `actions`: those that would change something now.

    `parked_event`: the id of its event that the relay has given up; None: there is none.
    """

    order: Order
    story: TimelineAnswer
    partner_ids: Mapping[str, str]
    actions: tuple[OrderAction, ...]
    has_saga: bool
    parked_event: UUID | None


async def read(pool: db.Pool, order_id: UUID, tenant: str | None, consumer: str) -> OrderView:
    """Return one order. `tenant` None: of any. `consumer`: the inbox name of the saga's consumer.

    Raises OrderNotFound, also for another tenant's order, and DatabaseUnavailable.
    """
    async with db.snapshot(pool) as conn:
        story, situation = await timeline.read_situation(conn, order_id, tenant, consumer)
        order = await store.load(conn, order_id)
        partner_ids = await queries.read_partner_ids(conn, order_id)
    if order is None:
        raise OrderNotFound(f"there is no order {order_id}")
    parked = situation.event_id if situation.parked_at is not None else None
    actions = tuple(find_actions(order, situation))
    return OrderView(order, story, partner_ids, actions, situation.direction is not None, parked)


def find_actions(order: Order, at: Situation) -> Iterator[OrderAction]:
    """Yield what would change something. By the time an operator asks for it, it may not any more."""
    if at.is_dead and (at.purged_at is None or order.status is Status.PENDING):  # a purged one is sent from the outbox
        yield OrderAction.REPLAY
    if at.parked_at is not None and not at.is_parked_dead_letter:
        yield OrderAction.REQUEUE
    is_waiting = at.finished_at is None and at.lease_owner is None and at.due_at is not None and at.due_at > at.now
    if is_waiting:
        yield OrderAction.RETRY
    if order.status is Status.PENDING and order.cancel_requested_at is None:
        yield OrderAction.COMPENSATE
        yield OrderAction.CANCEL

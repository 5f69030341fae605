"""What an operator may do to a saga: end its pause, or turn it back. Each with a reason, and a row that tells of it.

Both lock the order's row first, as a customer's cancel does, and write what they did, or found and left alone, in the
same transaction. Neither touches a lease: who drives the saga goes on, and hears of a turn with its next record. Each
may be cut off at any instant, and asked for again.
"""

from collections.abc import Mapping
from enum import StrEnum
from uuid import UUID

from app import db
from app.errors import OrderNotCancellable, OrderNotFound, SagaNotRetriable
from app.operations import audit
from app.operations.audit import AuditActor
from app.orders import store as order_store
from app.orders.model import Order, Reason, Status
from app.saga import cancel, queries, store


class SagaAction(StrEnum):
    """What an operator asks for."""

    RETRY = "retry"
    COMPENSATE = "compensate"


class ActionOutcome(StrEnum):
    """What came of it."""

    DUE = "due"  # its pause has ended
    DUE_ALREADY = "due-already"
    UNDER_WAY = "under-way"  # a process has its lease, and was left alone
    TURNS_BACK = "turns-back"
    TURNED_BEFORE = "turned-before"  # it turned back already, or is about to, for whatever reason
    CANCELLED = "cancelled"  # at once, as its saga had not started
    ENDED_BEFORE = "ended-before"  # everything is undone already
    REFUSED = "refused"  # it is too late for that


async def retry(pool: db.Pool, order_id: UUID, actor: AuditActor) -> ActionOutcome:
    """Have a saga that waits taken on at once, in whatever direction it goes.

    Raises OrderNotFound, and SagaNotRetriable when it has ended or never started.
    """
    async with db.transaction(pool) as conn:
        order = await _locked(conn, order_id)
        outcome = await _retry(conn, order.id)
        await audit.record(conn, actor, SagaAction.RETRY, order.id, outcome)
    if outcome is ActionOutcome.REFUSED:
        unstarted = order.status is Status.PENDING
        raise SagaNotRetriable("the saga has not started" if unstarted else f"the order is {order.status}")
    return outcome


async def _retry(conn: db.Connection, order_id: UUID) -> ActionOutcome:
    if await store.make_due(conn, order_id):
        return ActionOutcome.DUE
    saga = await queries.find(conn, order_id)
    if saga is None or saga.finished_at is not None:
        return ActionOutcome.REFUSED
    return ActionOutcome.UNDER_WAY if saga.next_attempt_in_seconds > 0 else ActionOutcome.DUE_ALREADY


async def compensate(pool: db.Pool, order_id: UUID, actor: AuditActor, trace: Mapping[str, str]) -> ActionOutcome:
    """Turn a saga back that goes forward; after the commit its order never becomes confirmed.

    It has the limits of a customer's cancel. Raises OrderNotFound and OrderNotCancellable.
    """
    async with db.transaction(pool) as conn:
        order = await _locked(conn, order_id)
        outcome = await _compensate(conn, order, trace)
        await audit.record(conn, actor, SagaAction.COMPENSATE, order.id, outcome)
    if outcome is ActionOutcome.REFUSED:
        raise OrderNotCancellable(f"the order is {order.status}")
    return outcome


async def _compensate(conn: db.Connection, order: Order, trace: Mapping[str, str]) -> ActionOutcome:
    try:
        cancelled = await cancel.cancel_locked(conn, order, Reason.COMPENSATED_BY_OPERATOR, trace)
    except OrderNotCancellable:
        return ActionOutcome.REFUSED
    has_ended = cancelled.order.status not in {Status.PENDING, Status.COMPENSATING}
    if cancelled.changed:
        return ActionOutcome.CANCELLED if has_ended else ActionOutcome.TURNS_BACK
    return ActionOutcome.ENDED_BEFORE if has_ended else ActionOutcome.TURNED_BEFORE


async def _locked(conn: db.Connection, order_id: UUID) -> Order:
    order = await order_store.load(conn, order_id, lock=True)
    if order is None:
        raise OrderNotFound(f"there is no order {order_id}")
    return order

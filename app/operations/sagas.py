"""What an operator may do to a saga: end its pause, or make it compensate. Each action is recorded with its reason.

All lock the order's row first, as a customer's cancel does, and record the outcome in the same transaction. None
touches a lease: the process that runs the saga continues, and sees the change at its next record. Each may be
interrupted at any point and repeated.
"""

from collections.abc import Mapping
from enum import StrEnum
from uuid import UUID

from opentelemetry import trace

from app import db
from app.errors import OrderNotCancellable, OrderNotFound, SagaNotRetriable
from app.observability.traces import link_to
from app.operations import audit
from app.operations.audit import AuditActor
from app.orders import store as order_store
from app.orders.model import Order, Reason, Status
from app.saga import cancel as cancellation
from app.saga import queries, store


class SagaAction(StrEnum):
    """What an operator asks for."""

    RETRY = "retry"
    COMPENSATE = "compensate"
    CANCEL = "cancel"


REASONS = {
    SagaAction.COMPENSATE: Reason.COMPENSATED_BY_OPERATOR,
    SagaAction.CANCEL: Reason.CANCELLED_BY_CUSTOMER,
}


class ActionOutcome(StrEnum):
    """The result of an action."""

    DUE = "due"  # its pause was ended
    DUE_ALREADY = "due-already"
    UNDER_WAY = "under-way"  # a process holds its lease; nothing was changed
    TURNS_BACK = "turns-back"
    TURNED_BEFORE = "turned-before"  # it already compensates, or will, for any reason
    CANCELLED = "cancelled"  # at once, because its saga had not started
    ENDED_BEFORE = "ended-before"  # everything was already undone
    REFUSED = "refused"  # too late: it is finished, or never started


async def retry(pool: db.Pool, order_id: UUID, actor: AuditActor) -> ActionOutcome:
    """Make a waiting saga due now, forward or compensating.

    Raises OrderNotFound; SagaNotRetriable when the saga is finished or has not started.
    """
    async with db.transaction(pool) as conn:
        order = await _locked(conn, order_id)
        await _link_request(conn, order.id)
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


async def compensate(pool: db.Pool, order_id: UUID, actor: AuditActor, headers: Mapping[str, str]) -> ActionOutcome:
    """Make a saga compensate. After the commit, its order never becomes confirmed.

    The conditions are those of a customer's cancel. Raises OrderNotFound and OrderNotCancellable.
    """
    return await _start_compensating(pool, order_id, SagaAction.COMPENSATE, actor, headers)


async def cancel(pool: db.Pool, order_id: UUID, actor: AuditActor, headers: Mapping[str, str]) -> ActionOutcome:
    """Cancel an order for its customer, who asked an operator to. Differs from `compensate` in how the order ends.

    It ends as after the customer's own cancel. Only the console offers it, for a customer who calls an operator: over
    HTTP, customers have their own route, `POST /orders/{id}/cancel`. Raises OrderNotFound and OrderNotCancellable.
    """
    return await _start_compensating(pool, order_id, SagaAction.CANCEL, actor, headers)


async def _start_compensating(
    pool: db.Pool, order_id: UUID, action: SagaAction, actor: AuditActor, headers: Mapping[str, str]
) -> ActionOutcome:
    async with db.transaction(pool) as conn:
        order = await _locked(conn, order_id)
        await _link_request(conn, order.id)
        outcome = await _cancel_locked(conn, order, REASONS[action], headers)
        await audit.record(conn, actor, action, order.id, outcome)
    if outcome is ActionOutcome.REFUSED:
        raise OrderNotCancellable(f"the order is {order.status}")
    return outcome


async def _cancel_locked(
    conn: db.Connection, order: Order, reason: Reason, headers: Mapping[str, str]
) -> ActionOutcome:
    try:
        cancelled = await cancellation.cancel_locked(conn, order, reason, headers)
    except OrderNotCancellable:
        return ActionOutcome.REFUSED
    has_ended = cancelled.order.status not in {Status.PENDING, Status.COMPENSATING}
    if cancelled.changed:
        return ActionOutcome.CANCELLED if has_ended else ActionOutcome.TURNS_BACK
    return ActionOutcome.ENDED_BEFORE if has_ended else ActionOutcome.TURNED_BEFORE


async def _link_request(conn: db.Connection, order_id: UUID) -> None:
    """Link the span of the operator's request to the order's trace, if the request is traced."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute("orders.order_id", str(order_id))
        for link in link_to(await store.read_traceparent(conn, order_id), "operates on"):
            span.add_link(link.context, link.attributes)


async def _locked(conn: db.Connection, order_id: UUID) -> Order:
    order = await order_store.load(conn, order_id, lock=True)
    if order is None:
        raise OrderNotFound(f"there is no order {order_id}")
    return order

"""Start sagas: the handler of `order.placed`."""

from collections.abc import Sequence
from uuid import UUID

from app import db
from app.messaging.envelope import Envelope, UnreadableMessage
from app.orders.model import Status
from app.saga import plan
from app.saga.steps import NEWEST, PLANS, Plans
from app.saga.store import HOLD_MARGIN_SECONDS


async def handle_order_placed(
    conn: db.Connection,
    envelopes: Sequence[Envelope],
    deadline_seconds: float,
    hold_seconds: int | None = None,
    plan_version: int = NEWEST,
    plans: Plans = PLANS,
) -> None:
    """Start the sagas of placed orders, at most one per order.

    The orders are locked first, so that starting and cancelling one exclude each other. An order that is no longer
    pending, for example because it was cancelled, gets no saga. Raises UnreadableMessage if there is no such order.
    """
    by_order = {_order_id(envelope): envelope for envelope in envelopes}
    rows = await conn.fetch("SELECT id, status FROM orders WHERE id = ANY($1) ORDER BY id FOR UPDATE", list(by_order))
    statuses = {UUID(int=row["id"].int): row["status"] for row in rows}
    if missing := by_order.keys() - statuses.keys():
        raise UnreadableMessage(f"there is no order {missing.pop()}")
    pending = [order_id for order_id, status in statuses.items() if status == Status.PENDING]
    if not pending:
        return
    state = plan.begin(plan_version, plans)
    await conn.execute(
        """
        INSERT INTO sagas (id, plan_version, direction, step, attempts, version, next_attempt_at, deadline_at,
                           traceparent, tracestate, started_at, updated_at, hold_seconds)
        SELECT new.id, $2, $3, $4, 0, 1, now.at, now.at + make_interval(secs => $5), new.traceparent, new.tracestate,
               now.at, now.at, coalesce($6, ceil($5) + $7)::int
        FROM unnest($1::uuid[], $8::text[], $9::text[]) AS new (id, traceparent, tracestate),
             (SELECT clock_timestamp() AS at) AS now
        ON CONFLICT (id) DO NOTHING
        """,
        pending,
        state.plan_version,
        state.direction,
        state.step,
        deadline_seconds,
        hold_seconds,
        HOLD_MARGIN_SECONDS,
        [by_order[order_id].traceparent for order_id in pending],
        [by_order[order_id].tracestate for order_id in pending],
    )


def _order_id(envelope: Envelope) -> UUID:
    try:
        return UUID(envelope.subject)
    except ValueError as error:
        raise UnreadableMessage(f"subject {envelope.subject!r} is not an order id") from error

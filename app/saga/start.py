"""Start sagas: the handler of `order.placed`."""

from collections.abc import Mapping
from uuid import UUID

from app import db
from app.messaging.envelope import Envelope, UnreadableMessage
from app.observability.traces import trace_headers
from app.orders.model import Status
from app.saga import plan
from app.saga.steps import NEWEST, PLANS, Plans
from app.saga.store import HOLD_MARGIN_SECONDS


async def handle_order_placed(
    conn: db.Connection,
    envelope: Envelope,
    deadline_seconds: float,
    hold_seconds: int | None = None,
    plan_version: int = NEWEST,
    plans: Plans = PLANS,
) -> None:
    """Start the saga of a placed order, at most once per order.

    The order is locked first, so that starting and cancelling it exclude each other. An order that is no longer
    pending, for example because it was cancelled, gets no saga. Raises UnreadableMessage if there is no such order.
    """
    try:
        order_id = UUID(envelope.subject)
    except ValueError as error:
        raise UnreadableMessage(f"subject {envelope.subject!r} is not an order id") from error
    status = await conn.fetchval("SELECT status FROM orders WHERE id = $1 FOR UPDATE", order_id)
    if status is None:
        raise UnreadableMessage(f"there is no order {order_id}")
    if status != Status.PENDING:
        return
    state = plan.begin(plan_version, plans)
    # The saga continues below the span of this delivery, if there is one, else below the event's.
    stored: Mapping[str, str | None] = {"traceparent": envelope.traceparent, "tracestate": envelope.tracestate}
    trace = trace_headers() or stored
    await conn.execute(
        """
        INSERT INTO sagas (id, plan_version, direction, step, attempts, version, next_attempt_at, deadline_at,
                           traceparent, tracestate, started_at, updated_at, hold_seconds)
        SELECT $1, $2, $3, $4, 0, 1, now.at, now.at + make_interval(secs => $5), $6, $7, now.at, now.at,
               coalesce($8, ceil($5) + $9)::int
        FROM (SELECT clock_timestamp() AS at) AS now
        ON CONFLICT (id) DO NOTHING
        """,
        order_id,
        state.plan_version,
        state.direction,
        state.step,
        deadline_seconds,
        trace.get("traceparent"),
        trace.get("tracestate"),
        hold_seconds,
        HOLD_MARGIN_SECONDS,
    )

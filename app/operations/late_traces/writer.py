"""Write the late traces of orders, one after the other, in the background.

Facts name the orders. They wait in memory: an order whose process dies before its trace is written has none. Sampled
orders have a trace already; the claim finds that in their rows.
"""

from collections.abc import Callable, Sequence
from uuid import UUID

import structlog
from opentelemetry import trace
from opentelemetry.trace import TraceState
from prometheus_client import Counter

from app import db
from app.messaging.topology import QueueSpec
from app.observability.stored_spans import StoredSpan
from app.observability.traces import trace_context
from app.operations.late_traces import rows, tree

log = structlog.get_logger(__name__)

MAX_WAITING = 10_000  # in an outage of Postgres; further orders have no late trace, which is counted
POLL_SECONDS = 5.0  # before the next attempt after an outage; a fact wakes the writer at once

Export = Callable[[int, TraceState, Sequence[StoredSpan]], None]  # trace id, tracestate, spans


class LateTraces:
    """Writes late traces. `queue`: of the consumer that starts sagas. `dropped`: counts orders that found no room."""

    def __init__(self, pool: db.Pool, queue: QueueSpec, export: Export, dropped: Counter) -> None:
        self._pool = pool
        self._queue = queue
        self._export = export
        self._dropped = dropped
        self._waiting: dict[UUID, None] = {}  # a set in the order of arrival

    def add(self, order_id: UUID | str) -> None:
        """Write the trace of this order, or of the order of an `order.placed` with this id. Other text is ignored."""
        try:
            found = UUID(str(order_id))
        except ValueError:  # an unreadable message that became a dead letter
            return
        if len(self._waiting) < MAX_WAITING:
            self._waiting[found] = None
        else:
            self._dropped.inc()

    async def run_once(self) -> int:
        """Write the traces of the orders that wait. Return how many were written. Raises DatabaseUnavailable."""
        written = 0
        while self._waiting:
            order_id = next(iter(self._waiting))
            written += await self._write(order_id)
            self._waiting.pop(order_id, None)
        return written

    async def _write(self, order_id: UUID) -> bool:
        found = await rows.claim(self._pool, order_id, self._queue.consumer)
        if found is None:
            return False
        with trace_context(found.trace):
            request = trace.get_current_span().get_span_context()
        if not request.is_valid:
            log.warning("late_traces.unreadable_context", order_id=str(order_id))
            return False
        self._export(request.trace_id, request.trace_state, tree.make_spans(found, request.span_id, self._queue.name))
        return True

"""Spans that are made from stored rows, after the work has ended."""

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from app.observability.traces import to_nanoseconds
from app.observability.tracing import SCOPE
from app.values import immutable

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
LATE = "orders.written_late"


@immutable
class StoredSpan:
    """One span. `parent_id` None: the root. `error`: why the work failed; None: it did not. None attributes are unset.

    The instants may come from different clocks. If the end is before the start, the duration is 0.
    """

    name: str
    kind: SpanKind
    span_id: int
    parent_id: int | None
    started_at: datetime
    ended_at: datetime
    attributes: Mapping[str, str | int | bool | None] = field(default_factory=dict)
    error: str | None = None


def make_readable(span: StoredSpan, trace_id: int, state: TraceState, resource: Resource) -> ReadableSpan:
    """Return the span as the exporter takes it."""
    started_ns = to_nanoseconds(span.started_at)
    return ReadableSpan(
        name=span.name,
        context=_context(trace_id, span.span_id, state),
        parent=None if span.parent_id is None else _context(trace_id, span.parent_id, state),
        resource=resource,
        attributes={LATE: True} | {name: value for name, value in span.attributes.items() if value is not None},
        kind=span.kind,
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=started_ns,
        end_time=max(started_ns, to_nanoseconds(span.ended_at)),
        instrumentation_scope=InstrumentationScope(SCOPE),
    )


def _context(trace_id: int, span_id: int, state: TraceState) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=SAMPLED, trace_state=state)

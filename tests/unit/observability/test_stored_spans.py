"""Spans that are made from rows."""

from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode, TraceState

from app.observability.stored_spans import StoredSpan, make_readable

AT = datetime(2026, 11, 28, 12, 0, 0, 123456, tzinfo=UTC)


def stored(seconds: float = 1, error: str | None = None) -> StoredSpan:
    attributes = {"orders.step": "charge_payment", "orders.partner": None}
    return StoredSpan("step", SpanKind.INTERNAL, 2, 1, AT, AT + timedelta(seconds=seconds), attributes, error)


@pytest.mark.parametrize(("seconds", "duration_ns"), [(1.5, 1_500_000_000), (0, 0), (-2, 0)])
def test_a_duration_is_never_negative(seconds: float, duration_ns: int) -> None:
    """The instants may come from the clocks of two machines."""
    span = make_readable(stored(seconds), 7, TraceState(), Resource({}))
    assert span.start_time == int(AT.timestamp()) * 1_000_000_000 + 123_456_000
    assert (span.end_time or 0) - (span.start_time or 0) == duration_ns


def test_a_late_span_is_exported_and_says_so() -> None:
    """Its context is sampled, whatever the request's was; an attribute without a value is left out."""
    span = make_readable(stored(), 7, TraceState([("vendor", "1")]), Resource({}))
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    assert parent is not None
    assert (context.trace_id, context.span_id, parent.trace_id, parent.span_id) == (7, 2, 7, 1)
    assert context.trace_flags.sampled
    assert context.trace_state.get("vendor") == "1"
    assert dict(span.attributes or {}) == {"orders.written_late": True, "orders.step": "charge_payment"}
    assert span.status.status_code is StatusCode.UNSET


def test_an_error_sets_the_status() -> None:
    status = make_readable(stored(error="card-declined"), 7, TraceState(), Resource({})).status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "card-declined")

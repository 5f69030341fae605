"""W3C trace context: read from headers, pass on in headers, keep within its size limit."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

ODD_DIGITS = frozenset("13579bdf")  # the last digit of flags with the lowest bit, `sampled`
TRACESTATE_BYTES = 512
TRACESTATE_MEMBER_BYTES = 128
# Not the global propagator: OTEL_PROPAGATORS could change what rows and messages hold, and it passes on baggage.
PROPAGATOR = TraceContextTextMapPropagator()


_chosen_span_id: ContextVar[int | None] = ContextVar("chosen_span_id", default=None)


def derive_span_id(*parts: object) -> int:
    """Return the span id of a stored row. The same parts always give the same id, and never 0, which is invalid."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") or 1


@contextlib.contextmanager
def chosen_span_id(span_id: int) -> Iterator[None]:
    """Give the spans that the block starts this id. It should start one."""
    token = _chosen_span_id.set(span_id)
    try:
        yield
    finally:
        _chosen_span_id.reset(token)


def find_chosen_span_id() -> int | None:
    """Return the id that the next span must have, if the block around it chose one."""
    return _chosen_span_id.get()


def to_nanoseconds(at: datetime | None = None) -> int:
    """Return the instant, now by default, in nanoseconds since 1970, as spans count."""
    return time.time_ns() if at is None else int(at.timestamp() * 1_000_000) * 1000


def sampled_headers(span_id: int) -> dict[str, str]:
    """Return the headers of a span of the current trace, with the flag that the trace is exported."""
    current = trace.get_current_span().get_span_context()
    if not current.is_valid:
        return {}
    flags = TraceFlags(current.trace_flags | TraceFlags.SAMPLED)
    span = SpanContext(current.trace_id, span_id, is_remote=True, trace_flags=flags, trace_state=current.trace_state)
    carrier: dict[str, str] = {}
    PROPAGATOR.inject(carrier, trace.set_span_in_context(NonRecordingSpan(span)))
    return carrier


def trace_headers() -> dict[str, str]:
    """Return W3C `traceparent` (and `tracestate`) of the current context; empty outside of a trace."""
    carrier: dict[str, str] = {}
    PROPAGATOR.inject(carrier)
    return carrier


def limit_tracestate(tracestate: str) -> str:
    """Return whole members of a `tracestate` header, at most 512 bytes.

    Members over 128 bytes are dropped first, then members from the end (W3C Trace Context, section 3.3.1.5). Without a
    limit, a caller could exceed the header limit of every partner, which would then refuse charges and refunds.
    """
    members = [member.strip() for member in tracestate.split(",") if member.strip()]
    if len(",".join(members).encode()) > TRACESTATE_BYTES:
        members = [member for member in members if len(member.encode()) <= TRACESTATE_MEMBER_BYTES]
    while len(",".join(members).encode()) > TRACESTATE_BYTES:
        members.pop()
    return ",".join(members)


def may_be_sampled(traceparent: str | None) -> bool:
    """Return whether the flags of a `traceparent` can say that its trace is sampled: a quick look."""
    return traceparent is not None and traceparent[-1:] in ODD_DIGITS


def link_to(traceparent: str | None, why: str) -> list[Link]:
    """Return a link to the span that `traceparent` names; none if it names none."""
    named = PROPAGATOR.extract({"traceparent": traceparent or ""}, context.Context())
    span = trace.get_current_span(named).get_span_context()
    return [Link(span, {"orders.link": why})] if span.is_valid else []


@contextlib.contextmanager
def trace_context(carrier: Mapping[str, Any]) -> Iterator[None]:
    """Continue the trace named by `traceparent` / `tracestate` in the carrier, if it names one."""
    given = {name: value for name, value in carrier.items() if value}
    if "tracestate" in given:
        given["tracestate"] = limit_tracestate(given["tracestate"])
    token = context.attach(PROPAGATOR.extract(given, context.get_current()))
    try:
        yield
    finally:
        context.detach(token)

"""The spans of a message: its time in the outbox, its publication, its processing.

    order transaction → outbox wait → publish (PRODUCER) → process (CONSUMER) → …

Each is the parent of the next one, so an order has one trace. The conventions for messaging allow a link between
publish and process instead; they advise it for consumers that take batches, which this one does not.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from uuid import UUID

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from app.messaging.envelope import Envelope
from app.messaging.outbox import ClaimedRow
from app.messaging.topology import EXCHANGE
from app.observability.signals import Signals
from app.observability.traces import (
    chosen_span_id,
    derive_span_id,
    link_to,
    may_be_sampled,
    to_nanoseconds,
    trace_context,
    trace_headers,
)

RABBITMQ = "rabbitmq"
IN_PROCESS = "in-process"


def attributes_of(envelope: Envelope) -> dict[str, AttributeValue]:
    """Return which event and order a span is about."""
    return {
        "orders.order_id": envelope.subject,
        "orders.tenant": envelope.tenant,
        "orders.event_id": str(envelope.id),
    }


def publish_attributes(envelope: Envelope, system: str) -> dict[str, AttributeValue]:
    """Return the attributes of a publish span, by the conventions for messaging."""
    return {
        **attributes_of(envelope),
        "messaging.system": system,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": f"{EXCHANGE}:{envelope.routing_key}",
        "messaging.rabbitmq.destination.routing_key": envelope.routing_key,
        "messaging.message.id": str(envelope.id),
    }


def publish_span_id(event_id: UUID, resends: int, attempts: int = 0) -> int:
    """Return the id of a publish span: a resend links to the publication before it, which it cannot look up."""
    return derive_span_id("publish", event_id, resends, attempts)


class PublishSpans:
    """The spans of a claimed batch. `envelopes`: the messages to send, which name their publish spans."""

    def __init__(self, rows: Sequence[ClaimedRow], signals: Signals, system: str) -> None:
        self._signals = signals
        self._system = system
        self._spans: list[Span | None] = []
        self.envelopes: list[Envelope] = []
        for row in rows:
            if may_be_sampled(row.envelope.traceparent):
                self._start(row)
            else:
                self._skip(row)

    def _skip(self, row: ClaimedRow) -> None:
        self._spans.append(None)
        self.envelopes.append(row.envelope)

    def _start(self, row: ClaimedRow) -> None:
        with trace_context({"traceparent": row.envelope.traceparent, "tracestate": row.envelope.tracestate}):
            if not trace.get_current_span().get_span_context().trace_flags.sampled:
                self._skip(row)
                return
            wait = self._signals.tracer.start_span(
                "outbox wait",
                attributes=attributes_of(row.envelope),
                start_time=min(to_nanoseconds(row.envelope.time), to_nanoseconds()),
            )
            wait.end()
            with trace.use_span(wait), chosen_span_id(publish_span_id(row.envelope.id, row.resends, row.attempts)):
                span = self._signals.tracer.start_span(
                    f"publish {EXCHANGE}:{row.envelope.routing_key}",
                    kind=SpanKind.PRODUCER,
                    attributes={
                        **publish_attributes(row.envelope, self._system),
                        "orders.attempt": row.attempts + 1,
                        "orders.replayed": row.resends > 0,
                    },
                    links=_link_to_last_publish(row, wait),
                )
            with trace.use_span(span):
                headers = trace_headers()
            self._spans.append(span)
            named = headers.get("traceparent"), headers.get("tracestate")
            self.envelopes.append(replace(row.envelope, traceparent=named[0], tracestate=named[1]))

    def end(self, errors: Sequence[str | None]) -> None:
        """End the spans. An error is the reason of a refusal. Skip rows whose result is unknown by passing `...`."""
        for span, error in zip(self._spans, errors, strict=True):
            if span is None or error == UNKNOWN:
                continue  # sent again, with a span of the same id
            if error is not None:
                span.set_attribute("error.type", "refused")
                span.set_status(Status(StatusCode.ERROR, error))
            span.end()


UNKNOWN = "unknown"  # not confirmed: the row will be sent again


def _link_to_last_publish(row: ClaimedRow, span: Span) -> list[Link]:
    if not row.resends:
        return []
    here = span.get_span_context()
    last = SpanContext(
        here.trace_id, publish_span_id(row.envelope.id, row.resends - 1), is_remote=True, trace_flags=here.trace_flags
    )
    return [Link(last, {"orders.link": "resend of"})]


@contextlib.contextmanager
def processing(signals: Signals, envelope: Envelope, consumer: str, system: str) -> Iterator[Span]:
    """Run the handling of a delivery in a span below its publish span."""
    destination = f"{EXCHANGE}:{envelope.routing_key}:orders.{consumer}"
    attributes = {
        **publish_attributes(envelope, system),
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": destination,
        "messaging.consumer.group.name": consumer,
    }
    attributes["orders.replayed"] = envelope.replayed_by is not None
    links = link_to(envelope.replayed_by, "replayed by")
    with (
        trace_context({"traceparent": envelope.traceparent, "tracestate": envelope.tracestate}),
        signals.span(f"process {destination}", SpanKind.CONSUMER, attributes, links) as span,
    ):
        yield span

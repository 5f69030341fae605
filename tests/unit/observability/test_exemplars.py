"""Histograms name the exported trace behind a sample, and no other trace."""

from collections.abc import Callable, Mapping

import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from app.api.facts import RequestServed
from app.observability.signals import Fact
from app.orders.model import Status
from app.saga.facts import PartnerCalled, SagaFinished
from app.saga.steps import Action
from tests.harness.observed import Observed

FACTS: Mapping[str, Callable[[], Fact]] = {
    "saga_duration_seconds": lambda: SagaFinished(Status.CONFIRMED, None, 0.1),
    "saga_step_duration_seconds": lambda: PartnerCalled("charge_payment", Action.DO, "done", 0.1),
    "http_server_request_duration_seconds": lambda: RequestServed("GET", "/orders", 200, 0.1),
}


def exemplars(signals: Observed) -> dict[str, str]:
    """Return the trace of every exemplar, by its metric."""
    return {
        sample.name.removesuffix("_bucket"): sample.exemplar.labels["trace_id"]
        for sample in signals.samples()
        if sample.exemplar
    }


def emit_all(signals: Observed) -> None:
    for make in FACTS.values():
        signals.emit(make())


@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF], ids=["sampled", "not sampled"])
def test_only_a_sampled_span_becomes_an_exemplar(sampler: Sampler) -> None:
    signals = Observed()
    tracer = TracerProvider(sampler=sampler).get_tracer("test")
    with tracer.start_as_current_span("span") as span:
        emit_all(signals)
    trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    assert exemplars(signals) == (dict.fromkeys(FACTS, trace_id) if sampler is ALWAYS_ON else {})


def test_the_context_of_a_caller_is_no_exemplar() -> None:
    """The caller samples its trace, but this process exports nothing to it."""
    signals = Observed()
    remote = SpanContext(trace_id=1, span_id=2, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    token = context.attach(trace.set_span_in_context(NonRecordingSpan(remote)))
    emit_all(signals)
    context.detach(token)
    assert exemplars(signals) == {}

"""The exporter side of tracing: decide which requests are traced, and send spans without ever blocking the service.

The sampling decision is made once, with the trace id, before the instrumentation of a request. Everything later follows
the flag in the trace context, so the provider only asks the parent.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import field

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, Sampler
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter

from app.observability.traces import find_chosen_span_id, limit_tracestate
from app.values import immutable

# One counter per process; each registry shows it.
SPANS_DROPPED = Counter(
    "trace_spans_dropped", "Spans that were lost: the queue was full, or the export failed", registry=None
)

SCOPE = "orders"
_IDS = RandomIdGenerator()
_W3C = TraceContextTextMapPropagator()
_chosen_trace_id: ContextVar[int | None] = ContextVar("chosen_trace_id", default=None)


class ChosenIds(RandomIdGenerator):
    """Random ids, unless one was chosen: a request's first span gets the trace id that its sampling was decided for."""

    def generate_span_id(self) -> int:
        """Return the span id that the block chose, or a random one."""
        return find_chosen_span_id() or super().generate_span_id()

    def generate_trace_id(self) -> int:
        """Return the trace id chosen for this request, or a random one."""
        return _chosen_trace_id.get() or super().generate_trace_id()


@immutable
class BatchConfig:
    """`queue_spans`: spans that wait for the exporter; beyond, they are dropped."""

    queue_spans: int = 2048
    batch_spans: int = 512
    delay_millis: float = 5000


class DroppingProcessor(SpanProcessor):
    """Hands ended spans to the exporter's thread; drops and counts them while too many wait."""

    def __init__(self, exporter: SpanExporter, config: BatchConfig) -> None:
        self._limit = config.queue_spans
        self._waiting = 0
        self._lock = threading.Lock()
        self._batches = BatchSpanProcessor(
            _CountingExporter(exporter, self),
            max_queue_size=config.queue_spans,
            schedule_delay_millis=config.delay_millis,
            max_export_batch_size=config.batch_spans,
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queue the span, or drop it. Never blocks."""
        with self._lock:
            if is_accepted := self._waiting < self._limit:
                self._waiting += 1
        if is_accepted:
            self._batches.on_end(span)
        else:
            SPANS_DROPPED.inc()

    def take(self, spans: int) -> None:
        """Make room: the exporter's thread has taken these spans from the queue."""
        with self._lock:
            self._waiting -= spans

    def shutdown(self) -> None:
        """Send what waits. Blocks while the exporter does."""
        self._batches.shutdown()  # type: ignore[no-untyped-call] # has no types

    def force_flush(self, timeout_millis: int | None = 30000) -> bool:
        """Send what waits. Blocks while the exporter does."""
        return self._batches.force_flush(timeout_millis)


class _CountingExporter(SpanExporter):
    """Counts the spans of failed exports as dropped."""

    def __init__(self, exporter: SpanExporter, processor: DroppingProcessor) -> None:
        self._exporter = exporter
        self._processor = processor

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._processor.take(len(spans))
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                SPANS_DROPPED.inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


@immutable
class TraceStart:
    """How a request continues or starts its trace. `caller`: the caller's span; invalid if it named none."""

    trace_id: int
    is_sampled: bool
    caller: SpanContext

    def headers(self) -> dict[str, str]:
        """Return the caller's context as headers, with our decision instead of the caller's."""
        if not self.caller.is_valid:
            return {}
        carrier: dict[str, str] = {}
        decided = SpanContext(
            self.trace_id, self.caller.span_id, is_remote=True,
            trace_flags=TraceFlags(TraceFlags.SAMPLED if self.is_sampled else TraceFlags.DEFAULT),
            trace_state=self.caller.trace_state,
        )  # fmt: skip
        _W3C.inject(carrier, trace.set_span_in_context(trace.NonRecordingSpan(decided), context.Context()))
        return carrier


@immutable
class Tracing:
    """Traces requests as `sampler` decides. `obeys_callers`: a caller's sampled flag counts as the parent's."""

    exporter: SpanExporter
    sampler: Sampler
    resource: Resource = field(default_factory=lambda: Resource.create({"service.name": SCOPE}))
    batches: BatchConfig = field(default_factory=BatchConfig)
    obeys_callers: bool = False
    processor: DroppingProcessor = field(init=False)
    provider: TracerProvider = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "processor", DroppingProcessor(self.exporter, self.batches))
        provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=self.resource, id_generator=ChosenIds(), shutdown_on_exit=False
        )
        provider.add_span_processor(self.processor)
        object.__setattr__(self, "provider", provider)

    @property
    def tracer(self) -> trace.Tracer:
        """Return what the rooms start their spans with."""
        return self.provider.get_tracer(SCOPE)

    def decide(self, headers: Mapping[str, str], name: str) -> TraceStart:
        """Choose the request's trace id, the caller's if it names one, and decide whether it is sampled."""
        given = dict(headers)
        if "tracestate" in given:
            given["tracestate"] = limit_tracestate(given["tracestate"])
        named = _W3C.extract(given, context.Context())
        caller = trace.get_current_span(named).get_span_context()
        trace_id = caller.trace_id if caller.is_valid else _IDS.generate_trace_id()
        parent = named if self.obeys_callers else context.Context()
        decision = self.sampler.should_sample(parent, trace_id, name).decision
        return TraceStart(trace_id, decision is Decision.RECORD_AND_SAMPLE, caller)

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        """Export spans that were made from stored times, whatever the sampler decided."""
        for span in spans:
            self.processor.on_end(span)

    async def shutdown(self, grace_seconds: float) -> None:
        """Send what waits for up to `grace_seconds`. The rest is lost with the process."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def flush() -> None:
            self.processor.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has closed, because the grace period is over
                loop.call_soon_threadsafe(done.set)

        # A daemon thread, so that a stalled collector cannot keep the process alive.
        threading.Thread(target=flush, name="trace-flush", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await done.wait()


@contextlib.contextmanager
def chosen_trace(trace_id: int) -> Iterator[None]:
    """Give the next root span of this context this trace id."""
    token = _chosen_trace_id.set(trace_id)
    try:
        yield
    finally:
        _chosen_trace_id.reset(token)


def unsampled_context(start: TraceStart) -> SpanContext:
    """Return the context of a request that is not traced: its trace id, a new span id, and the flag `not sampled`."""
    state = start.caller.trace_state if start.caller.is_valid else None
    return SpanContext(start.trace_id, _IDS.generate_span_id(), is_remote=False, trace_state=state)

"""Make the tracing of a process from the `OTEL_*` variables, and the task that writes traces after the fact."""

import contextlib
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import TraceState

from app import db
from app.bootstrap.workers import BackgroundTask, make_loop
from app.errors import DatabaseUnavailable
from app.messaging.facts import MessageDeadLettered
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals
from app.observability.stored_spans import StoredSpan, make_readable
from app.observability.tracing import SPANS_DROPPED, BatchConfig, Tracing
from app.operations.late_traces.writer import POLL_SECONDS, LateTraces
from app.saga.facts import SagaWentWrong
from app.telemetry_settings import Telemetry


def make_tracing(telemetry: Telemetry, *, obeys_callers: bool = False) -> Tracing | None:
    """Return the tracing that the variables describe. None: they name no exporter."""
    if not telemetry.is_on:
        return None
    exporter = OTLPSpanExporter(
        endpoint=telemetry.endpoint, timeout=telemetry.exporter_otlp_timeout, meter_provider=NoOpMeterProvider()
    )
    batches = BatchConfig(
        queue_spans=telemetry.bsp_max_queue_size,
        batch_spans=telemetry.bsp_max_export_batch_size,
        delay_millis=telemetry.bsp_schedule_delay,
    )
    resource = Resource.create(dict(telemetry.resource))
    return Tracing(exporter, make_sampler(telemetry), resource, batches, obeys_callers)


def late_traces_task(tracing: Tracing, pool: db.Pool, queue: QueueSpec, signals: Signals) -> BackgroundTask:
    """Return the task that writes the traces of what went wrong. `queue`: of the consumer that starts sagas."""

    def export(trace_id: int, state: TraceState, spans: Sequence[StoredSpan]) -> None:
        tracing.export([make_readable(span, trace_id, state, tracing.resource) for span in spans])

    writer = LateTraces(pool, queue, export, SPANS_DROPPED)
    signals.subscribe(SagaWentWrong, lambda fact: writer.add(fact.order_id))
    signals.subscribe(MessageDeadLettered, lambda fact: writer.add(fact.message_id))
    loop = make_loop("late-traces", writer.run_once, POLL_SECONDS, signals)
    signals.wake(loop.wake, SagaWentWrong, MessageDeadLettered)

    async def run() -> None:
        await loop.run()
        with contextlib.suppress(DatabaseUnavailable):
            await writer.run_once()  # what went wrong while the process was stopping

    return BackgroundTask("late-traces", run, loop.stop)


def make_sampler(telemetry: Telemetry) -> Sampler:
    """Return the sampler of `OTEL_TRACES_SAMPLER`."""
    root = {
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": TraceIdRatioBased(
            1.0 if telemetry.traces_sampler_arg is None else telemetry.traces_sampler_arg
        ),
    }[telemetry.traces_sampler.removeprefix("parentbased_")]
    return ParentBased(root) if telemetry.traces_sampler.startswith("parentbased_") else root

"""Make the tracing of a process from the `OTEL_*` variables."""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

from app.observability.tracing import BatchConfig, Tracing
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

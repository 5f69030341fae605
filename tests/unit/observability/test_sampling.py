"""Which requests are traced, and which `OTEL_*` variables are refused."""

import os
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.bootstrap.tracing import make_sampler, make_tracing
from app.errors import ConfigurationError
from app.observability.tracing import Tracing
from app.telemetry_settings import Telemetry, load_telemetry

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
REQUESTS = 2000


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without variables of OpenTelemetry."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def tracing_with(*, obeys_callers: bool = False, sampler: str = "", share: float | None = None) -> Tracing:
    given = Telemetry.model_validate({"traces_sampler": sampler, "traces_sampler_arg": share})
    return Tracing(InMemorySpanExporter(), make_sampler(given), obeys_callers=obeys_callers)


@pytest.fixture
def tenth() -> Iterator[Tracing]:
    tracing = tracing_with(sampler="parentbased_traceidratio", share=0.1)
    yield tracing
    tracing.processor.shutdown()


def test_a_ratio_samples_its_share(tenth: Tracing) -> None:
    """Within six standard deviations."""
    sampled = sum(tenth.decide({}, "POST").is_sampled for _ in range(REQUESTS))
    assert 200 - 6 * 13.5 < sampled < 200 + 6 * 13.5


def test_a_trace_id_always_gets_the_same_answer(tenth: Tracing) -> None:
    """So every service that samples by trace id decides alike, whatever flag the caller sends."""
    answers = {tenth.decide(SAMPLED, "POST").is_sampled for _ in range(20)}
    assert len(answers) == 1
    assert format(tenth.decide(SAMPLED, "POST").trace_id, "032x") == TRACE_ID


@pytest.mark.parametrize("traceparent", ["", "x", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE_ID}-{'0' * 16}-01"])
def test_an_invalid_traceparent_starts_a_new_trace(tenth: Tracing, traceparent: str) -> None:
    start = tenth.decide({"traceparent": traceparent}, "POST")
    assert start.trace_id
    assert not start.caller.is_valid
    assert start.headers() == {}


@pytest.mark.parametrize("obeys_callers", [False, True])
def test_a_callers_flag_counts_only_with_the_setting(*, obeys_callers: bool) -> None:
    tracing = tracing_with(sampler="parentbased_always_off", obeys_callers=obeys_callers)
    assert tracing.decide(SAMPLED, "POST").is_sampled is obeys_callers
    tracing.processor.shutdown()


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "shop", "OTEL_TRACES_SAMPLER": "always_on"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_an_exporter_switches_traces_on(env: pytest.MonkeyPatch, variables: dict[str, str], *, is_on: bool) -> None:
    """Nothing else does, and there are two ways to switch them off again."""
    for name, value in variables.items():
        env.setenv(name, value)
    telemetry = load_telemetry()
    assert telemetry.is_on is is_on
    if not is_on:
        assert make_tracing(telemetry) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.1"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=x"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000"),
        ("OTEL_SDK_DISABLED", "perhaps"),
    ],
)
def test_a_malformed_variable_is_one_line(env: pytest.MonkeyPatch, name: str, value: str) -> None:
    """It names the variable, and quotes no value, which may be a secret."""
    env.setenv(name, value)
    with pytest.raises(ConfigurationError) as error:
        load_telemetry()
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_the_service_name_wins(env: pytest.MonkeyPatch) -> None:
    """`OTEL_SERVICE_NAME` before `OTEL_RESOURCE_ATTRIBUTES`, before the default."""
    assert load_telemetry().resource["service.name"] == "orders"
    env.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop, deployment.environment.name=test")
    assert load_telemetry().resource == {"service.name": "shop", "deployment.environment.name": "test"}
    env.setenv("OTEL_SERVICE_NAME", "till")
    assert load_telemetry().resource["service.name"] == "till"

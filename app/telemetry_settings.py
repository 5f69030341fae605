"""The standard `OTEL_*` variables that this service obeys: name, default, unit and meaning.

The SDK would log a malformed value and continue with another one. Here it is a ConfigurationError, like any setting.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import ConfigurationError

PREFIX = "OTEL_"
SamplerName = Literal[
    "always_on", "always_off", "traceidratio",
    "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
]  # fmt: skip
Millis = Annotated[PositiveInt, Field(le=3_600_000)]


class Telemetry(BaseSettings):
    """Where traces go, and how many. The exporter reads its headers, certificates and compression by itself."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    sdk_disabled: bool = Field(default=False, description="`true`: no traces, whatever the other variables say")
    traces_exporter: Literal["otlp", "none"] | None = Field(
        default=None, description="`otlp` switches traces on, `none` off; not set: on if there is an endpoint"
    )
    exporter_otlp_endpoint: str = Field(default="", description="base URL of a collector; `/v1/traces` is appended")
    exporter_otlp_traces_endpoint: str = Field(default="", description="full URL for traces, instead of the base URL")
    exporter_otlp_protocol: Literal["http/protobuf"] = Field(
        default="http/protobuf", description="the only protocol that is supported"
    )
    exporter_otlp_traces_protocol: Literal["http/protobuf"] = Field(
        default="http/protobuf", description="the same, for traces alone"
    )
    exporter_otlp_timeout: float = Field(default=10, gt=0, le=3600, description="seconds for one export")
    exporter_otlp_headers: str = Field(default="", description="`name=value` pairs, separated by commas")
    traces_sampler: SamplerName = Field(
        default="parentbased_always_on",
        description="which requests are traced; a caller's flag counts only with `ORDERS_TRACE_CALLER_SAMPLING`",
    )
    traces_sampler_arg: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="the share of requests, with `…traceidratio`; 0.1: 10 %",
    )
    service_name: str = Field(default="", description="name of this service in traces; not set: `orders`")
    resource_attributes: str = Field(default="", description="more attributes, as `name=value` pairs")
    bsp_schedule_delay: Millis = Field(default=5000, description="milliseconds between exports")
    bsp_max_queue_size: PositiveInt = Field(
        default=2048, le=1_000_000, description="spans that may wait for the exporter; beyond, they are dropped"
    )
    bsp_max_export_batch_size: PositiveInt = Field(default=512, description="spans in one export")

    @field_validator("exporter_otlp_endpoint", "exporter_otlp_traces_endpoint")
    @classmethod
    def _endpoint_spelling(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            is_valid = not value or (parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0)
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError("must be a URL that begins with http:// or https://")
        return value

    @field_validator("exporter_otlp_headers", "resource_attributes")
    @classmethod
    def _pairs_spelling(cls, value: str) -> str:
        _parse_pairs(value)
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.bsp_max_export_batch_size > self.bsp_max_queue_size:
            raise ConfigurationError(f"{PREFIX}BSP_MAX_EXPORT_BATCH_SIZE must be at most {PREFIX}BSP_MAX_QUEUE_SIZE")
        return self

    @property
    def is_on(self) -> bool:
        """Return whether the variables name an exporter."""
        if self.sdk_disabled or self.traces_exporter == "none":
            return False
        endpoints = self.exporter_otlp_endpoint or self.exporter_otlp_traces_endpoint
        return self.traces_exporter == "otlp" or bool(endpoints)

    @property
    def endpoint(self) -> str:
        """Return the URL for traces."""
        base = self.exporter_otlp_endpoint or "http://localhost:4318"
        return self.exporter_otlp_traces_endpoint or f"{base.rstrip('/')}/v1/traces"

    @property
    def resource(self) -> Mapping[str, str]:
        """Return the attributes of this process. `OTEL_SERVICE_NAME` wins over `OTEL_RESOURCE_ATTRIBUTES`."""
        given = {"service.name": "orders", **_parse_pairs(self.resource_attributes)}
        return {**given, "service.name": self.service_name} if self.service_name else given


def _parse_pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if any(not name.strip() or not sign for name, sign, _ in pairs):
        raise ValueError("must be name=value pairs, separated by commas")
    return {name.strip(): value.strip() for name, _, value in pairs}


def load_telemetry() -> Telemetry:
    """Read the environment. Raises ConfigurationError: one line that names the variable."""
    try:
        return Telemetry()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigurationError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error

"""An OTLP sink: a collector on a real socket that decodes the spans it gets, and can fail or stall."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from app.bootstrap.tracing import make_tracing
from app.observability.tracing import Tracing
from app.telemetry_settings import Telemetry
from tests.harness.wait import AMPLE_SECONDS, wait_until


@dataclass(frozen=True)
class SeenSpan:
    """One span as the collector got it. Ids are hex; times are in nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    started_at: int
    ended_at: int
    attributes: dict[str, Any]
    failed: bool
    links: list[str]
    service: str


@dataclass
class Sink:
    """Where spans arrive. `status`: what it answers. `gate`: an export waits for it."""

    url: str = ""
    status: int = 200
    requests: int = 0
    spans: list[SeenSpan] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def of(self, trace_id: str) -> list[SeenSpan]:
        """Return the spans of one trace, in the order of their starts."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.started_at)

    def names(self, trace_id: str | None = None) -> list[str]:
        """Return the names of the spans, of one trace or of all."""
        return [span.name for span in (self.spans if trace_id is None else self.of(trace_id))]

    async def until(self, name: str, count: int = 1) -> list[SeenSpan]:
        """Wait for spans of this name, and return them."""

        def seen() -> list[SeenSpan]:
            return [span for span in self.spans if span.name == name]

        await wait_until(lambda: len(seen()) >= count, AMPLE_SECONDS, f"{count} × {name}; seen: {self.names()}")
        return seen()

    def tracing(self, **variables: Any) -> Tracing:
        """Return tracing that exports here at once. `variables`: fields of `Telemetry`."""
        obeys_callers = variables.pop("obeys_callers", False)
        given = {"exporter_otlp_endpoint": self.url, "bsp_schedule_delay": 10, **variables}
        tracing = make_tracing(Telemetry(**given), obeys_callers=obeys_callers)
        assert tracing is not None
        return tracing

    async def _take(self, request: web.Request) -> web.Response:
        export = ExportTraceServiceRequest.FromString(await request.read())
        self.requests += 1
        await self.gate.wait()
        if self.status == 200:
            self.spans += _decode(export)
        body = ExportTraceServiceResponse().SerializeToString()
        return web.Response(status=self.status, body=body, content_type="application/x-protobuf")


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Sink]:
    """Serve a sink on a free port."""
    sink = Sink()
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/traces", sink._take)  # noqa: SLF001 - this module's own
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        sink.url = "http://{}:{}".format(*runner.addresses[0][:2])
        yield sink
    finally:
        sink.gate.set()
        await runner.cleanup()


def _decode(export: ExportTraceServiceRequest) -> list[SeenSpan]:
    return [
        SeenSpan(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            name=span.name,
            kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            started_at=span.start_time_unix_nano,
            ended_at=span.end_time_unix_nano,
            attributes=_plain(span.attributes),
            failed=span.status.code == Status.STATUS_CODE_ERROR,
            links=[link.span_id.hex() for link in span.links],
            service=_plain(resource.resource.attributes).get("service.name", ""),
        )
        for resource in export.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}

"""Decide once, around everything else, whether a request is traced; only then instrument it.

Instrumenting a request costs more than serving it, so requests that are not sampled skip the instrumentation. They
still carry a trace id, with the flag "not sampled", so that logs, events and partners can name it.
"""

import os
import time
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.traces import trace_context
from app.observability.tracing import SCOPE, TraceStart, Tracing, chosen_trace, unsampled_context

UNTRACED = frozenset({"/livez", "/readyz", "/metrics", "/health/live", "/health/ready"})
TRACE_HEADERS = ("traceparent", "tracestate")
REPLACED = frozenset({b"traceparent", b"tracestate", b"baggage"})  # we neither need nor pass on a caller's baggage
# For `FastAPI(telemetry=…)`: a second server span per request, which would ignore the sampling decision.
NO_FASTAPI_TELEMETRY: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False
}  # fmt: skip


def install(app: FastAPI, tracing: Tracing | None) -> None:
    """Put the sampling decision, and with `tracing` the instrumentation, around the application."""
    if tracing is not None:
        os.environ["OTEL_SEMCONV_STABILITY_OPT_IN"] = "http"  # the stable names; the library reads it once
        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=_hide_path,
            tracer_provider=tracing.provider,
            meter_provider=NoOpMeterProvider(),
            excluded_urls="",  # probes are excluded below; OTEL_PYTHON_FASTAPI_EXCLUDED_URLS is not read
            exclude_spans=["receive", "send"],
        )
    build = app.build_middleware_stack
    # No other hook is outside of the instrumentation.
    app.build_middleware_stack = lambda: TraceMiddleware(build(), tracing)  # type: ignore[method-assign]


def _hide_path(span: Span, _: Scope) -> None:
    """Show the route instead of the path, which may contain an idempotency key, and no query."""
    attributes = getattr(span, "attributes", None) or {}
    span.set_attribute("url.path", attributes.get("http.route", "unmatched"))
    if "url.query" in attributes:
        span.set_attribute("url.query", "REDACTED")


class TraceMiddleware:
    """ASGI middleware that gives each request its trace context. `tracing` None: pass the caller's context on."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        headers = {name: ",".join(values) for name in TRACE_HEADERS if (values := given.getlist(name))}
        if self._tracing is None and not headers:
            await self._app(scope, receive, send)
        elif self._tracing is None:
            with trace_context(headers):
                await self._app(scope, receive, send)
        elif scope["path"] in UNTRACED:
            with suppress_http_instrumentation():
                await self._app(scope, receive, send)
        else:
            start = self._tracing.decide(headers, scope["method"])
            run = self._run_sampled if start.is_sampled else self._run_unsampled
            await run(self._tracing, start, scope, receive, send)

    async def _run_sampled(self, _: Tracing, start: TraceStart, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the instrumentation make the server span, from headers that carry our decision."""
        kept = [(name, value) for name, value in scope["headers"] if name not in REPLACED]
        decided = [(name.encode(), value.encode()) for name, value in start.headers().items()]
        with chosen_trace(start.trace_id):
            await self._app({**scope, "headers": kept + decided}, receive, send)

    async def _run_unsampled(
        self, tracing: Tracing, start: TraceStart, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Skip the instrumentation. A 5xx is traced all the same, with one span."""
        started_at, status = time.time_ns(), 0
        ours = unsampled_context(start)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(ours)))
        try:
            with suppress_http_instrumentation():
                await self._app(scope, receive, send_and_note)
        finally:
            context.detach(token)
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                tracing.export([_make_failed_span(tracing, start, ours, scope, status, started_at)])


def _make_failed_span(
    tracing: Tracing, start: TraceStart, ours: SpanContext, scope: Scope, status: int, started_at: int
) -> ReadableSpan:
    route = getattr(scope.get("route"), "path", None)
    attributes = {
        "http.request.method": scope["method"],
        "url.scheme": scope["scheme"],
        "http.response.status_code": status,
        "error.type": str(status),
        **({} if route is None else {"http.route": route}),
    }
    return ReadableSpan(
        f"{scope['method']} {route}" if route else scope["method"],
        SpanContext(ours.trace_id, ours.span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
        parent=start.caller if start.caller.is_valid else None,
        resource=tracing.resource,
        attributes=attributes,
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR),
        start_time=started_at,
        end_time=time.time_ns(),
        instrumentation_scope=InstrumentationScope(SCOPE),
    )

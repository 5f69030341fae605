"""What every request passes, below the framework: request id, trace, log context, metric, and the last resort.

Pure ASGI: a BaseHTTPMiddleware would cost more than everything else on the way of a request.
"""

import re
import time
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.api.bodies import has_body
from app.errors import Overloaded
from app.telemetry import Metrics, trace_context

log = structlog.get_logger(__name__)

REQUEST_ID = "X-Request-ID"
CLIENT_GONE = 499  # in the metric only; nginx's number for it
ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")

# Whoever looks after the process must see it under any load.
UNBOUNDED = frozenset({"/livez", "/readyz", "/metrics", "/health/live", "/health/ready"})


# On every answer, unless its route has said otherwise (as /docs does). Browsers have nothing to do with an API: they
# must not guess at its answers, keep them, frame them, or tell other sites where they were found.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


def protect(headers: list[tuple[bytes, bytes]]) -> None:
    """Add to the headers of an answer the security headers that are not among them."""
    present = {name for name, _ in headers}
    headers.extend(header for header in SECURITY_HEADERS if header[0] not in present)


class Place:
    """A request's place among those in flight."""

    def __init__(self, edge: "Edge") -> None:
        self._edge = edge
        self._taken = False

    def take(self) -> None:
        """Take the place, unless that is done. Raises Overloaded when there is none."""
        if not self._taken:
            if self._edge.in_flight >= self._edge.max_in_flight:
                raise Overloaded("as many requests are under way as the process serves at a time")
            self._edge.in_flight += 1
            self._taken = True

    def leave(self) -> None:
        """Give the place back, if it was taken."""
        self._edge.in_flight -= self._taken


class Edge:
    """ASGI middleware; the first and last of our own code that a request meets."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_in_flight: int) -> None:
        self._app = app
        self._metrics = metrics
        self.max_in_flight = max_in_flight
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            # Whatever answers GET answers HEAD (RFC 9110, section 9.3.2). The server, whose scope stays as it is, sends
            # the headers alone.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if ACCEPTABLE_ID.fullmatch(given) else str(uuid4())
        began = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered[REQUEST_ID] = request_id
                answered.update(scope.get("state", {}).get("answer_headers", {}))
                protect(message["headers"])
            await send(message)

        place = Place(self)
        scope.setdefault("state", {})["place"] = place
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            trace_context({name: ",".join(headers.getlist(name)) for name in ("traceparent", "tracestate")}),
        ):
            try:
                if scope["path"] not in UNBOUNDED and not (method == "POST" and has_body(headers)):
                    place.take()  # else its route takes it, when the body is complete
                await self._app(scope, receive, send_with_id)
            except Overloaded as error:
                await problems.answer_to(error)(scope, receive, send_with_id)
            except ClientDisconnect:
                # It hung up before its body was complete: nothing was done, and nobody is left to be answered.
                status = CLIENT_GONE
                log.info("http.client_gone", method=method, route=_route(scope))
            except Exception:
                log.exception("http.failed", method=method, route=_route(scope))
                if status:
                    raise  # the answer has begun: all that is left is to cut the connection
                await problems.internal_error()(scope, receive, send_with_id)
            finally:
                place.leave()
                duration = time.perf_counter() - began
                self._metrics.http_duration.labels(method, _route(scope), status).observe(duration)


def _route(scope: Scope) -> str:
    """Return the matched route's path, without its parameters: an idempotency key among them must not be logged."""
    return str(getattr(scope.get("route"), "path", "unmatched"))

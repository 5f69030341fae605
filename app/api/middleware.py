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
from app.api.facts import RequestServed
from app.errors import Overloaded
from app.observability.signals import Signals
from app.observability.traces import trace_context

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


class ConcurrencySlots:
    """How many requests the process serves at a time."""

    def __init__(self, count: int) -> None:
        self.free = count


class ConcurrencySlot:
    """One request's place among them. It is left while the request's body arrives: how long that takes, clients say."""

    def __init__(self, slots: ConcurrencySlots) -> None:
        self._slots = slots
        self._taken = False

    def acquire(self) -> None:
        """Take the place. Raises Overloaded when none is free."""
        if not self._slots.free:
            raise Overloaded("as many requests are under way as the process serves at a time")
        self._slots.free -= 1
        self._taken = True

    def release(self) -> None:
        """Give the place back, if it is taken."""
        self._slots.free += self._taken
        self._taken = False


class RequestMiddleware:
    """ASGI middleware; the first and last of our own code that a request meets."""

    def __init__(self, app: ASGIApp, signals: Signals, max_in_flight: int) -> None:
        self._app = app
        self._signals = signals
        self._slots = ConcurrencySlots(max_in_flight)

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
        started_at = time.perf_counter()
        status = 0
        slot = scope.setdefault("state", {})["slot"] = ConcurrencySlot(self._slots)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered[REQUEST_ID] = request_id
                answered.update(scope.get("state", {}).get("answer_headers", {}))
                protect(message["headers"])
            await send(message)

        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            trace_context({name: ",".join(headers.getlist(name)) for name in ("traceparent", "tracestate")}),
        ):
            try:
                if scope["path"] not in UNBOUNDED:
                    slot.acquire()
                await self._app(scope, receive, send_with_id)
            except Overloaded as error:  # of the place above; the framework answers those of the routes
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
                slot.release()
                self._signals.emit(RequestServed(method, _route(scope), status, time.perf_counter() - started_at))


def _route(scope: Scope) -> str:
    """Return the matched route's path, without its parameters: an idempotency key among them must not be logged."""
    return str(getattr(scope.get("route"), "path", "unmatched"))

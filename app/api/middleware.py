"""The middleware of every request: request id, log context, metric, concurrency limit, and the 500.

Pure ASGI: a BaseHTTPMiddleware would cost more than the rest of a request's path together. So would the framework's way
to a route, so this module calls the endpoints of `direct` routes itself.
"""

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid4

from app.api import problems
from app.api.facts import RequestServed
from app.errors import OrdersError, Overloaded
from app.observability import log_fields
from app.observability.signals import Signals

log = structlog.get_logger(__name__)

REQUEST_ID = "X-Request-ID"
CLIENT_GONE = 499  # in the metric only; the status that nginx uses
ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")

# Monitoring must reach the process under any load.
UNBOUNDED = frozenset({"/livez", "/readyz", "/metrics", "/health/live", "/health/ready"})


# On every response, unless its route has set the header (as /docs does). A browser must not sniff the type of an API's
# responses, cache them, frame them, or send their address to other sites.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


def protect(headers: list[tuple[bytes, bytes]]) -> None:
    """Add the security headers that the response does not have."""
    present = {name for name, _ in headers}
    headers.extend(header for header in SECURITY_HEADERS if header[0] not in present)


class ConcurrencySlots:
    """The number of requests that the process serves at the same time."""

    def __init__(self, count: int) -> None:
        self.free = count


class ConcurrencySlot:
    """One request's slot. It is released while the body arrives: the client decides how long that takes."""

    def __init__(self, slots: ConcurrencySlots) -> None:
        self._slots = slots
        self._taken = False

    def acquire(self) -> None:
        """Acquire a slot. Raises Overloaded when none is free."""
        if not self._slots.free:
            raise Overloaded("the process is already serving its maximum number of requests")
        self._slots.free -= 1
        self._taken = True

    def release(self) -> None:
        """Release the slot, if it is held."""
        self._slots.free += self._taken
        self._taken = False


class RequestMiddleware:
    """ASGI middleware around every route: the first and the last of our code to handle a request.

    `direct`: has the routes whose endpoints are functions of a request, and whose paths have no parameters.
    """

    def __init__(self, app: ASGIApp, signals: Signals, max_in_flight: int, direct: APIRouter | None = None) -> None:
        self._app = app
        routes = [] if direct is None else [route for route in direct.routes if isinstance(route, APIRoute)]
        self._direct = {
            (method, route.path): partial(_call, route) for route in routes for method in route.methods or ()
        }
        self._signals = signals
        self._slots = ConcurrencySlots(max_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        state = scope.setdefault("state", {})
        state["is_head"], state["is_stream"] = method == "HEAD", False
        if method == "HEAD":
            # Every GET route answers HEAD too (RFC 9110, section 9.3.2). The server keeps its own scope, and so sends
            # only the headers.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if ACCEPTABLE_ID.fullmatch(given) else str(uuid4())
        started_at = time.perf_counter()
        status = 0
        slot = state["slot"] = ConcurrencySlot(self._slots)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _complete(message["headers"], request_id, state)
            await send(message)

        with log_fields.bound(request_id=request_id):
            try:
                if scope["path"] not in UNBOUNDED:
                    slot.acquire()
                app = self._direct.get((method, scope["path"]), self._app)
                await app(scope, receive, send_with_id)
            except Overloaded as error:  # of the slot above; the framework handles those that routes raise
                await problems.answer_to(error)(scope, receive, send_with_id)
            except ClientDisconnect:
                # The client disconnected before its body was complete: nothing was done, and no response is possible.
                status = CLIENT_GONE
                log.info("http.client_gone", method=method, route=_find_route(scope))
            except Exception:
                log.exception("http.failed", method=method, route=_find_route(scope))
                if status:
                    raise  # the response has started: the server can only close the connection
                await problems.internal_error()(scope, receive, send_with_id)
            finally:
                slot.release()
                self._measure(scope, method, status, time.perf_counter() - started_at)

    def _measure(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        if not scope["state"]["is_stream"]:  # a stream lasts as long as its client likes: that is no latency
            self._signals.emit(RequestServed(method, _find_route(scope), status, seconds))


def _complete(headers: list[tuple[bytes, bytes]], request_id: str, state: Mapping[str, Any]) -> None:
    """Add the headers that every response has, and those that the guards left."""
    headers.append((REQUEST_ID.lower().encode(), request_id.encode()))
    for name, value in state.get("answer_headers", {}).items():
        headers.append((name.lower().encode(), value.encode()))
    protect(headers)


async def _call(route: APIRoute, scope: Scope, receive: Receive, send: Send) -> None:
    """Call a route's endpoint with the request."""
    scope["route"] = route
    try:
        response = await route.endpoint(Request(scope, receive, send))
    except OrdersError as error:
        response = problems.answer_to(error)
    await response(scope, receive, send)


def _find_route(scope: Scope) -> str:
    """Return the matched route's path template. A path may contain an idempotency key, which must not be logged."""
    return str(getattr(scope.get("route"), "path", "unmatched"))

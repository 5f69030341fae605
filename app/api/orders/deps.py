"""The dependencies of the order routes, and the response that shows an order."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app import db
from app.api import openapi
from app.api.body import Bodies
from app.api.orders.long_poll import Waiters
from app.api.orders.streams import Streams
from app.idempotency import Idempotency
from app.idempotency.key import HEADER, IdempotencyKey, RawRequest, bind, digest, read_key
from app.idempotency.replay_memory import ReplayMemory
from app.idempotency.store import StoredResponse
from app.observability import log_fields
from app.observability.signals import Signals
from app.orders.model import Order
from app.values import immutable

KEY_PARAMETER = openapi.header_parameter(
    HEADER,
    'The same for every attempt of one write: `"abc"` or `abc`, 1–255 visible ASCII characters',
    "4c1f3b0e-7b6e-4f0c",
    **openapi.KEY_OR_BLANK_SCHEMA,
)

REPLAYED = {"Idempotent-Replay": "true", "Idempotent-Replayed": "true"}


@immutable
class OrdersDeps:
    """The dependencies of the order routes. `admit` raises OutboxFull while the service accepts no new orders."""

    pool: db.Pool
    idempotency: Idempotency
    replay_memory: ReplayMemory
    key_required: bool
    admit: Callable[[], None]
    bodies: Bodies
    waiters: Waiters
    streams: Streams
    signals: Signals

    def read_key(self, request: Request) -> str | None:
        """Return the request's key. Raises the errors of `app.idempotency.key.read_key`."""
        key = read_key(request.headers.getlist(HEADER), required=self.key_required)
        if key is not None:
            log_fields.bind(idempotency_key=log_fields.hash_key(key))
        return key

    def raw_request(self, request: Request, tenant: str, body: bytes) -> RawRequest:
        """Return the request with its key, before its body is parsed. Raises as `read_key` does."""
        path, query = _target(request)
        content_type = request.headers.get("content-type", "")
        return RawRequest(tenant, self.read_key(request), request.method, path, query, content_type, digest(body))

    def bind_key(self, request: Request, tenant: str, body: Mapping[str, Any]) -> IdempotencyKey | None:
        """Return the request's key, bound to the request. `body` is in normal form. Raises as `read_key` does."""
        key, (path, query) = self.read_key(request), _target(request)
        return None if key is None else bind(tenant, key, request.method, path, query, body)


def _target(request: Request) -> tuple[str, str]:
    """Return the path and the query. `request.url` would put a whole URL together to take it apart again: 10 µs."""
    return request.scope["path"], request.scope["query_string"].decode("latin-1")


def stored_response(order: Order, status: HTTPStatus) -> StoredResponse:
    """Return the response that shows an order, as it is stored under a key."""
    return StoredResponse(status, f"/orders/{order.id}", order.json.encode())


def send(stored: StoredResponse) -> Response:
    """Return the HTTP response, which says if it is a replay: in both headers that clients know."""
    headers = {"Location": stored.location, **(REPLAYED if stored.replayed else {})}
    return Response(stored.body, stored.status, headers, media_type="application/json")

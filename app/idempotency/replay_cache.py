"""Encode and decode the response copies in Redis. A copy names its key, request and expiry; all three are checked.

    SHA-256 of the rest, in hex
    one line of JSON: {"name", "fingerprint", "fingerprint_version", "status", "location", "expires_at"}
    the body

The digest detects copies that are damaged or from another release. It does not protect against an attacker who can
write to Redis.
"""

import hashlib
import json
import math
import re
from http import HTTPStatus

from app.idempotency.key import IdempotencyKey
from app.idempotency.store import StoredResponse

PREFIX = "orders:answer:"
LOCATION = re.compile(r"/[\x21-\x7e]*")


def name(key: IdempotencyKey) -> str:
    """Return the Redis key of the copy. It is hashed, because tenants choose their keys, and these may be long."""
    return PREFIX + hashlib.sha256(f"{key.tenant}\0{key.key}".encode()).hexdigest()


def encode(key: IdempotencyKey, response: StoredResponse, expires_at: float) -> bytes:
    """Return the copy of a response; `expires_at`: when its key expires, in Unix seconds."""
    head = {**_request(key), "status": response.status, "location": response.location, "expires_at": expires_at}
    content = json.dumps(head).encode() + b"\n" + response.body
    return _digest(content) + b"\n" + content


def decode(key: IdempotencyKey, raw: bytes, now: float) -> StoredResponse | None:
    """Return the response if the copy is intact, of exactly this request, and not expired; else None: ask Postgres."""
    digest, _, content = raw.partition(b"\n")
    if digest != _digest(content):
        return None
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        request = _request(key)
        same = {field: head[field] for field in request} == request
        remaining_seconds = head["expires_at"] - now
        response = StoredResponse(int(head["status"]), str(head["location"]), body, True, remaining_seconds)  # noqa: FBT003 - replayed
    except Exception:  # noqa: BLE001 - the copy may hold anything; Postgres is asked instead
        return None
    good = HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES and LOCATION.fullmatch(response.location)
    return response if same and good and 0 < remaining_seconds < math.inf and body else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _request(key: IdempotencyKey) -> dict[str, str | int]:
    version = key.fingerprint_version
    return {"name": name(key), "fingerprint": key.fingerprint.hex(), "fingerprint_version": version}

"""Copies of finished answers, as they lie in Redis: each names its key, its request and its end, and is not trusted.

a digest of the rest, in hex
one line of JSON: {"name", "fingerprint", "fingerprint_version", "status", "location", "expires_at"}
the body

The digest finds what was damaged or written by another release; it is no proof against somebody who can write to Redis.
"""

import hashlib
import json
import math
import re
from http import HTTPStatus

from app.idempotency.store import Answer, Key

PREFIX = "orders:answer:"
LOCATION = re.compile(r"/[\x21-\x7e]*")


def name(key: Key) -> str:
    """Return where the key's copy lies. Hashed: tenants' keys are theirs, and may be as long as they like."""
    return PREFIX + hashlib.sha256(f"{key.tenant}\0{key.key}".encode()).hexdigest()


def written(key: Key, answer: Answer, expires_at: float) -> bytes:
    """Return the copy of an answer; `expires_at`: when its key ends, in Unix seconds."""
    head = {**_request(key), "status": answer.status, "location": answer.location, "expires_at": expires_at}
    content = json.dumps(head).encode() + b"\n" + answer.body
    return _digest(content) + b"\n" + content


def read(key: Key, raw: bytes, now: float) -> Answer | None:
    """Return the answer if the copy is whole, of this very request, and has not ended, else None: ask Postgres."""
    digest, _, content = raw.partition(b"\n")
    if digest != _digest(content):
        return None
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        same = {field: head[field] for field in _request(key)} == _request(key)
        remaining_seconds = head["expires_at"] - now
        answer = Answer(int(head["status"]), str(head["location"]), body, True, remaining_seconds)  # noqa: FBT003 - replayed
    except Exception:  # noqa: BLE001 - whatever it holds, Postgres is asked
        return None
    good = HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES and LOCATION.fullmatch(answer.location)
    return answer if same and good and 0 < remaining_seconds < math.inf and body else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _request(key: Key) -> dict[str, str | int]:
    version = key.fingerprint_version
    return {"name": name(key), "fingerprint": key.fingerprint.hex(), "fingerprint_version": version}

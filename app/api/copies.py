"""Copies of finished answers, as they lie in Redis: each names its key, its request and its end, and is not trusted.

one line of JSON: {"name", "fingerprint", "fingerprint_version", "status", "location", "expires_at"}, then the body
"""

import hashlib
import json

from app.orders.keys import Answer, Key

PREFIX = "orders:answer:"


def name(key: Key) -> str:
    """Return where the key's copy lies. Hashed: tenants' keys are theirs, and may be as long as they like."""
    return PREFIX + hashlib.sha256(f"{key.tenant}\0{key.key}".encode()).hexdigest()


def written(key: Key, answer: Answer, expires_at: float) -> bytes:
    """Return the copy of an answer; `expires_at`: when its key ends, in Unix seconds."""
    head = {**_request(key), "status": answer.status, "location": answer.location, "expires_at": expires_at}
    return json.dumps(head).encode() + b"\n" + answer.body


def read(key: Key, raw: bytes, now: float) -> Answer | None:
    """Return the answer if the copy is of this very request and has not ended, else None: ask Postgres."""
    line, _, body = raw.partition(b"\n")
    try:
        head = json.loads(line)
        same = {field: head[field] for field in _request(key)} == _request(key)
        remaining_seconds = head["expires_at"] - now
        answer = Answer(int(head["status"]), str(head["location"]), body, True, remaining_seconds)  # noqa: FBT003 - replayed
    except (ValueError, TypeError, KeyError):
        return None
    return answer if same and remaining_seconds > 0 and body else None


def _request(key: Key) -> dict[str, str | int]:
    version = key.fingerprint_version
    return {"name": name(key), "fingerprint": key.fingerprint.hex(), "fingerprint_version": version}

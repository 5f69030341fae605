"""Idempotency: which key a request carries, and which request it stands for.

Postgres decides (see `orders.keys`): the key's row commits with the order and holds the answer. What this module adds
is the reading of the header, the request's fingerprint, and single flight: of many concurrent requests with one key,
one per process goes to Postgres and the others wait here, so that a retry storm cannot use up the pool.

A crash can happen anywhere: before the commit there is neither row nor order, and the retry is the first request;
after it the retry finds the row and gets the same bytes.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from app.errors import IdempotencyKeyInvalid, IdempotencyKeyMissing, RequestInProgress
from app.orders.keys import Key

HEADER = "Idempotency-Key"
MAX_LENGTH = 255
STRUCTURED_STRING = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')  # RFC 9651, section 3.3.3
VISIBLE = re.compile(r"[\x21-\x7e]+")
FINGERPRINT_VERSION = 1


def read_key(values: Sequence[str], *, required: bool) -> str | None:
    """Return the key in the header's values, None if there is none or it is blank.

    `"abc"` (a structured-field string, draft-ietf-httpapi-idempotency-key-header) and `abc` are the same key. Raises
    IdempotencyKeyMissing if `required`, IdempotencyKeyInvalid unless it is 1 to 255 visible ASCII characters.
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


def fingerprint(method: str, path: str, query: str, body: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of the request in normal form (version FINGERPRINT_VERSION)."""
    canonical = json.dumps([method, path, query, body], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).digest()


def key_for(tenant: str, key: str, method: str, path: str, query: str, body: Mapping[str, Any]) -> Key:
    """Bind a caller's key to the request that it came with."""
    return Key(tenant, key, fingerprint(method, path, query, body), FINGERPRINT_VERSION)


class SingleFlight:
    """One request per (tenant, key) at a time in this process."""

    def __init__(self) -> None:
        # Weak: a key's lock lives exactly as long as somebody holds it or waits for it.
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def one(self, key: Key | None, wait_seconds: float) -> AsyncIterator[float]:
        """Hold the key's place and yield what is left of `wait_seconds`; RequestInProgress when that is nothing."""
        if key is None:
            yield wait_seconds
            return
        lock = self._locks.setdefault((key.tenant, key.key), asyncio.Lock())
        began = time.monotonic()
        try:
            async with asyncio.timeout(wait_seconds):
                await lock.acquire()
        except TimeoutError as error:
            raise RequestInProgress(f"the first request with this {HEADER} is still running") from error
        try:
            yield wait_seconds - (time.monotonic() - began)
        finally:
            lock.release()

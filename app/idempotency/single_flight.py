"""Idempotency: which key a request carries, and which request it stands for.

Postgres decides (see `idempotency.transaction`): the key's row commits with the order and holds the answer. What this
module adds is the reading of the header, the request's fingerprint, and two ways to spare Postgres:

- a copy in Redis of every finished answer (`idempotency.replay_cache`), left behind after the commit. It is believed
  only if it names the very request; in any doubt Postgres is asked. Redis lost, flushed, frozen or restored changes
  speed, nothing else;
- single flight: of many concurrent requests with one key, one per process goes to Postgres, the others wait here and
  share its answer, so that a retry storm cannot use up the pool.

A crash can happen anywhere: before the commit there is neither row nor order, and the retry is the first request;
after it the retry finds the row and gets the same bytes.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request

from app.cache import Cache
from app.errors import IdempotencyKeyInvalid, IdempotencyKeyMissing, IdempotencyKeyReused, RequestInProgress
from app.idempotency import replay_cache
from app.idempotency.concurrency_limit import Admission
from app.idempotency.store import Answer, Key
from app.observability.metrics import Metrics

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

Act = Callable[[float], Awaitable[Answer]]


def read_key(values: Sequence[str], *, required: bool) -> str | None:
    """Return the key in the header's values, None if there is none or it is blank.

    `"abc"` (a structured-field string, draft-ietf-httpapi-idempotency-key-header), `"abc";v=1` (whose parameters mean
    nothing) and `abc` are the same key. Raises IdempotencyKeyMissing if `required`, IdempotencyKeyInvalid unless it is
    1 to 255 visible ASCII characters.
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


class Idempotency:
    """Answers a write once for its key: from a copy, from the request before it in this process, or by Postgres."""

    def __init__(
        self,
        cache: Cache | None,
        admission: Admission,
        metrics: Metrics,
        *,
        required: bool,
        ttl_seconds: float,
        wait_seconds: float,
    ) -> None:
        self.ttl_seconds = ttl_seconds
        self._cache = cache
        self._admission = admission
        self._metrics = metrics
        self._required = required
        self._wait_seconds = wait_seconds
        # Weak: a flight lives exactly as long as somebody is in it or waits for it.
        self._flights: WeakValueDictionary[tuple[str, str], _Flight] = WeakValueDictionary()

    def key(self, request: Request, tenant: str, body: Mapping[str, Any]) -> Key | None:
        """Bind the request's key to what it asks for; `body` in normal form. Raises as `read_key` does."""
        header = read_key(request.headers.getlist(HEADER), required=self._required)
        if header is None:
            return None
        return key_for(tenant, header, request.method, request.url.path, request.url.query, body)

    async def answer(self, key: Key | None, act: Act) -> Answer:
        """Return what the key stands for, or what `act`, given the seconds it may wait, makes it stand for.

        Raises IdempotencyKeyReused, RequestInProgress, Overloaded, and whatever `act` does.
        """
        if key is None:
            async with self._admission.turn(self._wait_seconds):
                return await act(self._wait_seconds)
        if copy := await self._copy(key):
            self._metrics.idempotent_replays.labels("redis").inc()
            return copy
        try:
            answer = await self._in_turn(key, act)
        except (IdempotencyKeyReused, RequestInProgress) as error:
            kind = "reused" if isinstance(error, IdempotencyKeyReused) else "in-progress"
            self._metrics.idempotency_conflicts.labels(kind).inc()
            raise
        if answer.replayed:
            self._metrics.idempotent_replays.labels("postgres").inc()
        return answer

    async def _in_turn(self, key: Key, act: Act) -> Answer:
        """Let one request a key through; those behind it share its answer."""
        flight = self._flights.setdefault((key.tenant, key.key), _Flight())
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._wait_seconds):
                await flight.turn.acquire()
        except TimeoutError as error:
            raise RequestInProgress(f"the first request with this {HEADER} is still running") from error
        try:
            if flight.landed is not None and flight.landed[0] == key:
                return replace(flight.landed[1], replayed=True)
            async with self._admission.turn(began + self._wait_seconds - time.monotonic()):
                taken = time.monotonic()
                answer = await act(began + self._wait_seconds - taken)
            flight.landed = (key, answer)
            self._leave_copy(key, answer, answer.remaining_seconds - (time.monotonic() - taken))
            return answer
        finally:
            flight.turn.release()

    async def _copy(self, key: Key) -> Answer | None:
        raw = None if self._cache is None else await self._cache.get(replay_cache.name(key))
        return None if raw is None else replay_cache.read(key, raw, time.time())

    def _leave_copy(self, key: Key, answer: Answer, remaining_seconds: float) -> None:
        """Copy what is committed; Redis must forget it no later than Postgres does."""
        if self._cache is not None:
            value = replay_cache.written(key, answer, time.time() + remaining_seconds)
            self._cache.put(replay_cache.name(key), value, remaining_seconds)


class _Flight:
    """The place where requests of one key wait for each other; `landed`: what the last one came to."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.landed: tuple[Key, Answer] | None = None

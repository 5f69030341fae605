"""The issuer's public keys (RFC 7517), fetched when needed, by one request at a time.

An unknown key id triggers another fetch, at most once in `cooldown_seconds`, so invented key ids cannot put load on the
issuer. While the issuer is unavailable, known keys stay valid for `MAX_AGE_SECONDS`. After that, and for an unknown
key, tokens cannot be verified: IssuerUnavailable.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
import jwt
import structlog

from app.auth.tokens import PUBLIC_KEY_ALGORITHMS, UNREADABLE
from app.errors import IssuerUnavailable, Unauthorized

log = structlog.get_logger(__name__)

FETCH_SECONDS = 2.0
FRESH_SECONDS = 300.0  # a key that the issuer has withdrawn is accepted for this long
MAX_AGE_SECONDS = 3600.0
COOLDOWN_SECONDS = 10.0
MAX_BYTES = 256 * 1024
MAX_KEYS = 100


def open_session() -> aiohttp.ClientSession:
    """Open an HTTP session for the issuer; the caller closes it. Needs a running event loop."""
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # a small answer that decompresses to a large one would evade the size limit
        timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS),
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


class KeySet:
    """The keys at `url`. Only asymmetric keys are used: a public key must never serve as a shared secret."""

    algorithms = PUBLIC_KEY_ALGORITHMS

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        fresh_seconds: float = FRESH_SECONDS,
        max_age_seconds: float = MAX_AGE_SECONDS,
        cooldown_seconds: float = COOLDOWN_SECONDS,
    ) -> None:
        self._session = session
        self._url = url
        self._fresh_seconds = fresh_seconds
        self._max_age_seconds = max_age_seconds
        self._cooldown_seconds = cooldown_seconds
        self._keys: list[Mapping[str, Any]] = []
        self._parsed: dict[tuple[str | None, str], jwt.PyJWK] = {}
        self._fetched_at = self._tried_at = -float("inf")  # monotonic
        self._fetching = asyncio.Lock()

    async def find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK:
        """Return the key with this id for this algorithm; without an id, the only key for it."""
        key = self._find_known(key_id, algorithm)
        if key is None or (self._age() > self._fresh_seconds and not self._fetching.locked()):
            await self._refresh(key_id, algorithm)
            key = self._find_known(key_id, algorithm)
        if key is not None:
            return key
        if self._fetched_at < self._tried_at or self._age() > self._max_age_seconds:
            raise IssuerUnavailable("the issuer's keys cannot be fetched")
        raise Unauthorized("the token is signed with a key that its issuer does not have", "invalid_token")

    def _age(self) -> float:
        return time.monotonic() - self._fetched_at

    def _find_known(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        if self._age() > self._max_age_seconds:
            return None
        if found := self._parsed.get((key_id, algorithm)):
            return found
        candidates = [key for key in self._keys if _suits(key, key_id, algorithm)]
        if len(candidates) != 1:
            return None
        try:
            found = jwt.PyJWK(dict(candidates[0]), algorithm)
        except UNREADABLE:
            return None
        return self._parsed.setdefault((key_id, algorithm), found)

    async def _refresh(self, key_id: str | None, algorithm: str) -> None:
        async with self._fetching:
            stale = self._age() > self._fresh_seconds
            if not stale and self._find_known(key_id, algorithm):
                return  # another request fetched it while this one waited for the lock
            if time.monotonic() - self._tried_at < self._cooldown_seconds:
                return
            self._tried_at = time.monotonic()
            try:
                self._keys = await self._fetch()
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
                log.warning("jwks.unavailable", error=type(error).__name__)
                return
            self._parsed.clear()
            self._fetched_at = time.monotonic()

    async def _fetch(self) -> list[Mapping[str, Any]]:
        async with self._session.get(self._url, allow_redirects=False) as answer:
            if answer.status != HTTPStatus.OK:
                raise ValueError(f"status {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ValueError("too large")
        document = json.loads(body)
        keys = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(keys, list) or len(keys) > MAX_KEYS:
            raise ValueError("no set of keys")
        return [key for key in keys if isinstance(key, dict)]


def _suits(key: Mapping[str, Any], key_id: str | None, algorithm: str) -> bool:
    return (
        key.get("kty") in ("RSA", "EC", "OKP")  # a tuple, not a set: values from an issuer may not be hashable
        and key.get("use", "sig") == "sig"
        and key.get("alg", algorithm) == algorithm
        and key_id in (None, key.get("kid"))
    )

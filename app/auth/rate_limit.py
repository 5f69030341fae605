"""How often each tenant may ask, counted in Redis for all processes together; without Redis, by each for itself.

Windows are fixed and begin at round times (UTC), so that one call to Redis is all that a request costs, and every
process knows by its clock when a quota is whole again. A client that straddles two windows may send two quotas in
one window's time; that is the price. Redis out, slow or emptied changes the precision of the limit, nothing else.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import limits
from limits.aio.storage import MemoryStorage

from app.cache import Cache
from app.errors import TooManyRequests

POLICY = "default"
KEY_PREFIX = "orders:rate:"


@dataclass(frozen=True, slots=True)
class Quota:
    """What is left to a tenant. `reset_seconds`: whole seconds until the quota is whole again, ≥ 1."""

    limit: int
    window_seconds: int
    count: int
    reset_seconds: int

    def headers(self) -> Mapping[str, str]:
        """Return both fields of draft-ietf-httpapi-ratelimit-headers-10, as structured fields (RFC 9651)."""
        remaining = max(0, self.limit - self.count)
        return {
            "RateLimit-Policy": f'"{POLICY}";q={self.limit};w={self.window_seconds}',
            "RateLimit": f'"{POLICY}";r={remaining};t={self.reset_seconds}',
        }

    def check(self) -> None:
        """Raise TooManyRequests when the quota was used up before."""
        if self.count > self.limit:
            raise TooManyRequests(
                f"more than {self.limit} requests in {self.window_seconds} s; come again later", self.reset_seconds
            )


class RateLimit:
    """A quota like `200/second` for each tenant. `cache` None: this process counts for itself."""

    def __init__(self, limit: str, cache: Cache | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._item = limits.parse(limit)
        self._window_seconds = self._item.get_expiry()
        self._cache = cache
        self._local = MemoryStorage()
        self._clock = clock

    async def count(self, tenant: str) -> Quota:
        """Count one request, and return what the tenant is left with."""
        window, elapsed = divmod(self._clock(), self._window_seconds)
        key = self._item.key_for(tenant, str(int(window)))
        count = None if self._cache is None else await self._cache.count(KEY_PREFIX + key, self._window_seconds)
        if count is None:
            count = await self._local.incr(key, self._window_seconds)
        reset = max(1, math.ceil(self._window_seconds - elapsed))
        return Quota(self._item.amount, self._window_seconds, count, reset)

"""Limit the request rate of each tenant: counted in Redis across all processes, or per process without Redis.

Windows are fixed and begin at round times (UTC). A request therefore costs one call to Redis, and every process knows
from its clock when a quota resets. The price: around a window boundary, a client may send two quotas within the length
of one window. If Redis is down, slow or emptied, only the precision of the limit suffers.
"""

import math
import time
from collections.abc import Callable, Mapping

import limits
from limits.aio.storage import MemoryStorage

from app.cache import Cache
from app.errors import TooManyRequests
from app.values import immutable

POLICY = "default"
KEY_PREFIX = "orders:rate:"


@immutable
class Quota:
    """A tenant's use of its quota. `reset_seconds`: whole seconds until the quota resets, at least 1."""

    limit: int
    window_seconds: int
    count: int
    reset_seconds: int

    def headers(self) -> Mapping[str, str]:
        """Return both header fields of draft-ietf-httpapi-ratelimit-headers-10, as structured fields (RFC 9651)."""
        remaining = max(0, self.limit - self.count)
        return {
            "RateLimit-Policy": f'"{POLICY}";q={self.limit};w={self.window_seconds}',
            "RateLimit": f'"{POLICY}";r={remaining};t={self.reset_seconds}',
        }

    def check(self) -> None:
        """Raise TooManyRequests if the tenant has exceeded its quota."""
        if self.count > self.limit:
            raise TooManyRequests(
                f"more than {self.limit} requests in {self.window_seconds} s; try again later", self.reset_seconds
            )


class RateLimit:
    """A quota like `200/second` for each tenant. Without a `cache`, this process counts only its own requests."""

    def __init__(self, limit: str, cache: Cache | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._item = limits.parse(limit)
        self._window_seconds = self._item.get_expiry()
        self._cache = cache
        self._local = MemoryStorage()
        self._clock = clock

    async def count(self, tenant: str) -> Quota:
        """Count one request, and return the tenant's quota."""
        window, elapsed = divmod(self._clock(), self._window_seconds)
        key = self._item.key_for(tenant, str(int(window)))
        count = None if self._cache is None else await self._cache.count(KEY_PREFIX + key, self._window_seconds)
        if count is None:
            count = await self._local.incr(key, self._window_seconds)
        reset = max(1, math.ceil(self._window_seconds - elapsed))
        return Quota(self._item.amount, self._window_seconds, count, reset)

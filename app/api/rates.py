"""How often each tenant may ask, counted in Redis for all processes together; without Redis, by each for itself.

Windows are fixed and begin at round times (UTC), so that one call to Redis is all that a request costs, and every
process knows by its clock when a quota is whole again. A client that straddles two windows may send two quotas in
one window's time; that is the price. Redis out, slow or emptied changes the precision of the limit, nothing else.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import limits
import structlog
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import TooManyRequests

log = structlog.get_logger(__name__)

POLICY = "default"
KEY_PREFIX = "orders:rate"
BREAKER_SECONDS = 5.0  # a frozen Redis costs one request its timeout, once in this time
MAX_CONNECTIONS = 32


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


def open_pool(url: str, timeout_seconds: float) -> BlockingConnectionPool:
    """Make the connections to Redis, without connecting; `aclose` them. Every call fails fast, and never repeats."""
    return BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=timeout_seconds,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
    )


def _storage(pool: BlockingConnectionPool) -> RedisStorage:
    # The URL is the pool's business; this one only says which kind of server it is.
    return RedisStorage("async+redis://", implementation="redispy", key_prefix=KEY_PREFIX, connection_pool=pool)  # type: ignore[arg-type] # passed on to redis-py


class RateLimit:
    """A quota like `200/second` for each tenant. `pool` None: this process counts for itself."""

    def __init__(
        self,
        limit: str,
        pool: BlockingConnectionPool | None = None,
        *,
        clock: Callable[[], float] = time.time,
        breaker_seconds: float = BREAKER_SECONDS,
    ) -> None:
        self._item = limits.parse(limit)
        self._window_seconds = self._item.get_expiry()
        self._shared = None if pool is None else _storage(pool)
        self._timeout_seconds = None if pool is None else pool.timeout
        self._local = MemoryStorage()
        self._clock = clock
        self._breaker_seconds = breaker_seconds
        self._shared_again_at = 0.0  # monotonic: the breaker is open until then

    async def count(self, tenant: str) -> Quota:
        """Count one request, and return what the tenant is left with."""
        now = self._clock()
        window, gone = divmod(now, self._window_seconds)
        key = self._item.key_for(tenant, str(int(window)))
        count = await self._count_shared(key)
        if count is None:
            count = await self._local.incr(key, self._window_seconds)
        reset = max(1, math.ceil(self._window_seconds - gone))
        return Quota(self._item.amount, self._window_seconds, count, reset)

    async def _count_shared(self, key: str) -> int | None:
        """Count in Redis; None while it is out."""
        now = time.monotonic()
        if self._shared is None or now < self._shared_again_at:
            return None
        if self._shared_again_at:
            self._shared_again_at = now + self._breaker_seconds  # one request tries; the others go on without meanwhile
        try:
            async with asyncio.timeout(self._timeout_seconds):
                count = await self._shared.incr(key, self._window_seconds)
        except Exception as error:  # noqa: BLE001 - connecting raises more than RedisError
            self._shared_again_at = time.monotonic() + self._breaker_seconds
            log.warning("rates.redis_out", error=type(error).__name__)
            return None
        self._shared_again_at = 0.0
        return count

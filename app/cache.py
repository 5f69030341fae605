"""The Redis door: concurrent reads and writes share one round trip; it never fails and never keeps a caller long.

Redis holds copies only, so whatever is wrong with it looks like an absent copy. A call that is not answered in time
opens the breaker: for PAUSE_SECONDS nobody asks at all, then one round trip tries again. redis-py's own retries are
off: with them a frozen Redis would cost a caller seconds.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import CacheUnavailable

log = structlog.get_logger(__name__)

PAUSE_SECONDS = 2.0
MAX_WRITES_WAITING = 10_000  # beyond, copies are dropped: a copy is never owed


@dataclass(frozen=True, slots=True)
class _Write:
    name: str
    value: bytes
    ttl_milliseconds: int


class Cache:
    """Copies by name. Use it from one event loop, and `close` it."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._redis = Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
            client_name="orders",
        )
        self._reads: dict[str, asyncio.Future[bytes | None]] = {}
        self._writes: list[_Write] = []
        self._carrier: asyncio.Task[None] | None = None
        self._closed_until = 0.0  # of the event loop's clock: the breaker is open until then

    async def get(self, name: str) -> bytes | None:
        """Return the copy, None if there is none or Redis is out."""
        if self._is_open():
            return None
        answer = self._reads.get(name)
        if answer is None:
            answer = self._reads[name] = asyncio.get_running_loop().create_future()
            self._carry()
        return await asyncio.shield(answer)  # others may be waiting for the same one

    def put(self, name: str, value: bytes, ttl_seconds: float) -> None:
        """Leave a copy behind, at most for `ttl_seconds`; nobody waits for it, and it may be lost."""
        milliseconds = int(ttl_seconds * 1000)
        if milliseconds > 0 and not self._is_open() and len(self._writes) < MAX_WRITES_WAITING:
            self._writes.append(_Write(name, value, milliseconds))
            self._carry()

    async def check(self) -> None:
        """Ask Redis itself, whatever the breaker says. Raises CacheUnavailable."""
        try:
            await self._round_trip([], [])
        except Exception as error:
            raise CacheUnavailable(f"redis: {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Carry what waits, then close the connections."""
        if self._carrier is not None:
            await self._carrier
        await self._redis.aclose()

    def _is_open(self) -> bool:
        return asyncio.get_running_loop().time() < self._closed_until

    def _carry(self) -> None:
        if self._carrier is None or self._carrier.done():
            self._carrier = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Take round trips until nothing waits; what comes in during one goes together with the next."""
        while self._reads or self._writes:
            reads, self._reads = self._reads, {}
            writes, self._writes = self._writes, []
            values: Sequence[bytes | None] = [None] * len(reads)
            try:
                values = await self._round_trip(list(reads), writes)
            except Exception as error:  # noqa: BLE001 - connecting raises more than RedisError, and nothing may get out
                self._closed_until = asyncio.get_running_loop().time() + PAUSE_SECONDS
                log.warning("redis.out", error=repr(error), pause_seconds=PAUSE_SECONDS)
            for answer, value in zip(reads.values(), values, strict=True):
                if not answer.done():
                    answer.set_result(value)

    async def _round_trip(self, names: list[str], writes: list[_Write]) -> Sequence[bytes | None]:
        async with asyncio.timeout(self._timeout_seconds), self._redis.pipeline(transaction=False) as pipeline:
            for write in writes:
                pipeline.set(write.name, write.value, px=write.ttl_milliseconds)
            if names:
                pipeline.mget(names)
            if not names and not writes:
                pipeline.ping()
            answers = await pipeline.execute()
            return answers[-1] if names else []

"""The only access to Redis: concurrent calls share one round trip; no call fails or waits long.

Redis holds only copies and counts, so any problem with it looks like a missing copy. A round trip that is not answered
in time opens the breaker: for PAUSE_SECONDS no call asks Redis, then one round trip tries again. redis-py's own retries
are off: with them, a frozen Redis would cost a caller seconds.
"""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import CacheUnavailable
from app.values import immutable

log = structlog.get_logger(__name__)

PAUSE_SECONDS = 2.0
MAX_WRITES_WAITING = 10_000  # further copies are dropped: no caller depends on a copy
# The options that a URL may have. redis-py lets a URL override its arguments, and `decode_responses`, `protocol` or
# `retry_on_timeout` would change the form of a reply, or how long it takes.
URL_OPTIONS = frozenset(
    {"db", "username", "password"}
    | {f"ssl_{what}" for what in ("ca_certs", "cert_reqs", "certfile", "check_hostname", "keyfile", "keyfile_password")}
)


@immutable
class _Write:
    name: str
    value: bytes
    ttl_milliseconds: int


@immutable
class _Count:
    name: str
    ttl_seconds: int
    answer: asyncio.Future[int | None]


class Cache:
    """Copies and counts by name. Use it from one event loop, and `close` it."""

    def __init__(self, url: str, timeout_seconds: float, pause_seconds: float = PAUSE_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        self._pause_seconds = pause_seconds
        self._redis = Redis.from_url(
            _with_known_options(url),
            socket_timeout=None,  # a round trip has one timeout; redis-py would start a task or a timer for each reply
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
            client_name="orders",
        )
        self._reads: dict[str, asyncio.Future[bytes | None]] = {}
        self._counts: list[_Count] = []
        self._writes: list[_Write] = []
        self._carrier: asyncio.Task[None] | None = None
        self._closed_until = 0.0  # of the event loop's clock: the breaker is open until then

    async def get(self, name: str) -> bytes | None:
        """Return the copy, None if there is none or Redis is unavailable."""
        if self._is_open():
            return None
        answer = self._reads.get(name)
        if answer is None:
            answer = self._reads[name] = asyncio.get_running_loop().create_future()
            self._carry()
        return await asyncio.shield(answer)  # other callers may wait for the same answer

    def put(self, name: str, value: bytes, ttl_seconds: float) -> None:
        """Store a copy for at most `ttl_seconds`. Returns before it is stored; the copy may be lost."""
        milliseconds = int(ttl_seconds * 1000)
        if milliseconds > 0 and not self._is_open() and len(self._writes) < MAX_WRITES_WAITING:
            self._writes.append(_Write(name, value, milliseconds))
            self._carry()

    async def count(self, name: str, ttl_seconds: int) -> int | None:
        """Add one to a count that expires after `ttl_seconds`, and return it; None if Redis is unavailable."""
        if self._is_open():
            return None
        count = _Count(name, ttl_seconds, asyncio.get_running_loop().create_future())
        self._counts.append(count)
        self._carry()
        return await count.answer

    async def check(self) -> None:
        """Ping Redis, even while the breaker is open. Raises CacheUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._redis.ping()
        except Exception as error:
            raise CacheUnavailable(f"redis: {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Send what waits, then close the connections."""
        if self._carrier is not None:
            await self._carrier
        await self._redis.aclose()

    def _is_open(self) -> bool:
        return asyncio.get_running_loop().time() < self._closed_until

    def _carry(self) -> None:
        if self._carrier is None or self._carrier.done():
            self._carrier = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Make round trips until nothing waits. Calls that arrive during one are sent with the next."""
        while self._reads or self._counts or self._writes:
            reads, self._reads = self._reads, {}
            counts, self._counts = self._counts, []
            writes, self._writes = self._writes, []
            try:
                await self._round_trip(reads, counts, writes)
            except Exception as error:  # noqa: BLE001 - connecting raises more than RedisError, and callers get None
                self._closed_until = asyncio.get_running_loop().time() + self._pause_seconds
                log.warning("redis.out", error=repr(error), pause_seconds=self._pause_seconds)
            _settle(reads.values(), [None] * len(reads))
            _settle([count.answer for count in counts], [None] * len(counts))

    async def _round_trip(
        self, reads: dict[str, asyncio.Future[bytes | None]], counts: list[_Count], writes: list[_Write]
    ) -> None:
        async with asyncio.timeout(self._timeout_seconds), self._redis.pipeline(transaction=False) as pipeline:
            for write in writes:
                pipeline.set(write.name, write.value, px=write.ttl_milliseconds)
            for count in counts:
                pipeline.set(count.name, 0, ex=count.ttl_seconds, nx=True)
                pipeline.incr(count.name)
            if reads:
                pipeline.mget(list(reads))
            answers = await pipeline.execute(raise_on_error=False)
        totals = answers[len(writes) : len(answers) - bool(reads)][1::2]
        _settle([count.answer for count in counts], [total if isinstance(total, int) else None for total in totals])
        if reads and isinstance(answers[-1], list):
            _settle(reads.values(), [copy if isinstance(copy, bytes) else None for copy in answers[-1]])
        if refusal := next((answer for answer in answers if isinstance(answer, Exception)), None):
            raise refusal  # such as a write to a full Redis; the other answers are valid


def _settle(futures: Collection[asyncio.Future[Any]], values: Sequence[Any]) -> None:
    """Answer the callers that still wait; a caller that stopped waiting has cancelled its future."""
    for future, value in zip(futures, values, strict=True):
        if not future.done():
            future.set_result(value)


def _with_known_options(url: str) -> str:
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    known = [(name, value) for name, value in given if name in URL_OPTIONS]
    if ignored := sorted({name for name, _ in given} - URL_OPTIONS):
        log.warning("redis.options_ignored", options=ignored)
    return urlunsplit(parts._replace(query=urlencode(known)))

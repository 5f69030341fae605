"""Access to Redis: callers share round trips, and any problem with Redis looks like a missing copy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from redis.asyncio import Redis as Client

from app.cache import PAUSE_SECONDS, Cache
from app.errors import CacheUnavailable
from tests.harness import servers
from tests.harness.wait import AMPLE_SECONDS, wait_until


@contextlib.asynccontextmanager
async def cache_at(
    url: str, timeout_seconds: float = AMPLE_SECONDS, pause_seconds: float = PAUSE_SECONDS
) -> AsyncIterator[Cache]:
    cache = Cache(url, timeout_seconds, pause_seconds)
    try:
        yield cache
    finally:
        await cache.close()


@pytest.fixture
async def cache(redis_url: str) -> AsyncIterator[Cache]:
    async with cache_at(redis_url) as cache:
        yield cache


@pytest.fixture
async def server(server_directory: Path) -> AsyncIterator[servers.Addressed]:
    """A server of this test's own, to be killed and frozen."""
    async with servers.redis(server_directory) as server:
        yield server


async def test_a_copy_exists_until_it_expires(cache: Cache, redis_url: str) -> None:
    """A stored copy is returned until it expires; other names are missing."""
    cache.put("name", b"value", 60)
    assert await cache.get("name") == b"value"
    assert await cache.get("other") is None
    async with Client.from_url(redis_url) as client:
        assert 0 < await client.pttl("name") <= 60_000


async def test_an_expired_copy_is_not_stored(cache: Cache) -> None:
    """A copy without remaining time is not stored."""
    cache.put("name", b"value", 0)
    cache.put("name", b"value", -1)
    assert await cache.get("name") is None


async def test_concurrent_reads_share_a_round_trip(cache: Cache, redis_url: str) -> None:
    """Concurrent reads share one round trip, and each gets its own copy."""
    for number in range(50):
        cache.put(str(number), str(number).encode(), 60)
    await cache.get("0")
    async with Client.from_url(redis_url) as client:
        await client.config_resetstat()
        values = await asyncio.gather(*(cache.get(str(number % 50)) for number in range(200)))
        calls = (await client.info("commandstats"))["cmdstat_mget"]["calls"]
    assert values == [str(number % 50).encode() for number in range(200)]
    assert calls <= 2


async def test_a_cancelled_reader_affects_no_other(cache: Cache) -> None:
    """A cancelled reader does not cancel the answer for the others."""
    cache.put("name", b"value", 60)
    given_up, patient = (asyncio.create_task(cache.get("name")) for _ in range(2))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await patient == b"value"


async def test_without_a_server_every_copy_is_missing(free_port: int) -> None:
    """Without a server, every copy is missing."""
    async with cache_at(f"redis://127.0.0.1:{free_port}/0") as cache:
        cache.put("name", b"value", 60)
        assert await cache.get("name") is None
        with pytest.raises(CacheUnavailable):
            await cache.check()


async def test_with_another_protocol_every_copy_is_missing(postgres_url: str) -> None:
    """If the server speaks another protocol, every copy is missing."""
    address = postgres_url.rpartition("@")[2].partition("/")[0]
    async with cache_at(f"redis://{address}/0") as cache:
        assert await cache.get("name") is None


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_a_dead_or_frozen_server_is_skipped(server: servers.Addressed, way: str) -> None:
    """A dead or frozen server is skipped, and used again once it is back."""
    async with cache_at(server.url, timeout_seconds=0.2) as cache:

        async def is_there() -> bool:
            cache.put("name", b"value", 60)
            return await cache.get("name") == b"value"

        await wait_until(is_there, AMPLE_SECONDS, "a copy")
        await server.kill() if way == "kill" else server.freeze()
        assert set(await asyncio.gather(*(cache.get("name") for _ in range(100)))) == {None}
        assert await cache.get("name") is None
        await server.start() if way == "kill" else server.thaw()
        await wait_until(is_there, AMPLE_SECONDS, "copies again")


@pytest.mark.parametrize(
    "options", ["decode_responses=True", "protocol=3&encoding=utf-16", "socket_timeout=0&max_connections=0"]
)
async def test_url_options_do_not_change_results(redis_url: str, options: str) -> None:
    """Options in the URL do not change the results."""
    async with cache_at(f"{redis_url}?{options}") as cache:
        cache.put("name", b"\xff value", 60)
        assert await cache.get("name") == b"\xff value"


async def test_the_database_may_be_an_option(redis_url: str) -> None:
    """The database may be given by the URL's option `db`."""
    address, _, database = redis_url.rpartition("/")
    async with cache_at(redis_url) as cache, cache_at(f"{address}?db={database}") as same:
        cache.put("name", b"value", 60)
        assert await cache.get("name") == b"value"
        assert await same.get("name") == b"value"


async def test_a_late_rest_of_an_answer_is_no_answer_to_the_next(redis_url: str) -> None:
    """A round trip that ends in the middle of an answer takes its connection with it."""
    async with Client.from_url(redis_url) as client:
        await client.mset({"first": b"1", "second": b"2"})
    async with Stalling.to(redis_url) as proxy, cache_at(proxy.url, timeout_seconds=0.3, pause_seconds=0.01) as cache:
        await wait_until(lambda: answers(cache, "second", b"2"), AMPLE_SECONDS, "an answer through the proxy")
        proxy.open.clear()
        assert await cache.get("first") is None
        proxy.open.set()
        found = await asyncio.gather(*(cache.get("second") for _ in range(3)))
        assert b"1" not in found
        await wait_until(lambda: answers(cache, "second", b"2"), AMPLE_SECONDS, "an answer on a new connection")


async def answers(cache: Cache, name: str, value: bytes) -> bool:
    found = await cache.get(name)
    assert found in {None, value}
    return found == value


class Stalling:
    """A TCP proxy. While it is not open, it passes on the first bytes of each answer only."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = host, port
        self.open = asyncio.Event()
        self.open.set()
        self.url = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator["Stalling"]:
        parts = urlsplit(url)
        proxy = cls(parts.hostname or "", parts.port or 6379)
        server = await asyncio.start_server(proxy._serve, "127.0.0.1")
        proxy.url = urlunsplit(parts._replace(netloc=f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            yield proxy
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        tasks = [
            asyncio.create_task(self._pass(reader, upstream_writer)),
            asyncio.create_task(self._pass(upstream_reader, writer, stalls=True)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for each in (writer, upstream_writer):
            each.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, stalls: bool = False) -> None:
        while data := await reader.read(65536):
            if stalls and not self.open.is_set():
                writer.write(data[:6])
                data = data[6:]
                await self.open.wait()
            writer.write(data)


async def test_a_refused_command_affects_no_other(cache: Cache, redis_url: str) -> None:
    """If Redis refuses one command of a round trip, the other answers are valid."""
    cache.put("copy", b"value", 60)
    assert await cache.get("copy") == b"value"
    async with Client.from_url(redis_url) as client:
        await client.lpush("rate", "no number")
    answers = await asyncio.gather(cache.count("rate", 60), cache.get("copy"), cache.count("other", 60))
    assert list(answers) == [None, b"value", 1]

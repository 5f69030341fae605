"""The Redis door: many callers share a round trip, and whatever is wrong with Redis looks like an absent copy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis as Client

from app.cache import Cache
from app.errors import CacheUnavailable
from tests.harness import servers
from tests.harness.wait import AMPLE_SECONDS, wait_until


@contextlib.asynccontextmanager
async def cache_at(url: str, timeout_seconds: float = AMPLE_SECONDS) -> AsyncIterator[Cache]:
    cache = Cache(url, timeout_seconds)
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


async def test_what_was_put_is_there_for_its_time_and_what_was_not_is_absent(cache: Cache, redis_url: str) -> None:
    cache.put("name", b"value", 60)
    assert await cache.get("name") == b"value"
    assert await cache.get("other") is None
    async with Client.from_url(redis_url) as client:
        assert 0 < await client.pttl("name") <= 60_000


async def test_what_has_no_time_left_is_not_put(cache: Cache) -> None:
    cache.put("name", b"value", 0)
    cache.put("name", b"value", -1)
    assert await cache.get("name") is None


async def test_concurrent_reads_share_a_round_trip_and_each_gets_its_own(cache: Cache, redis_url: str) -> None:
    for number in range(50):
        cache.put(str(number), str(number).encode(), 60)
    await cache.get("0")
    async with Client.from_url(redis_url) as client:
        await client.config_resetstat()
        values = await asyncio.gather(*(cache.get(str(number % 50)) for number in range(200)))
        calls = (await client.info("commandstats"))["cmdstat_mget"]["calls"]
    assert values == [str(number % 50).encode() for number in range(200)]
    assert calls <= 2


async def test_a_reader_that_gives_up_does_not_take_the_answer_of_the_others_along(cache: Cache) -> None:
    cache.put("name", b"value", 60)
    given_up, patient = (asyncio.create_task(cache.get("name")) for _ in range(2))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await patient == b"value"


async def test_an_absent_server_is_an_absent_copy(free_port: int) -> None:
    async with cache_at(f"redis://127.0.0.1:{free_port}/0") as cache:
        cache.put("name", b"value", 60)
        assert await cache.get("name") is None
        with pytest.raises(CacheUnavailable):
            await cache.check()


async def test_a_server_that_speaks_another_protocol_is_an_absent_copy(postgres_url: str) -> None:
    address = postgres_url.rpartition("@")[2].partition("/")[0]
    async with cache_at(f"redis://{address}/0") as cache:
        assert await cache.get("name") is None


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_a_server_that_dies_or_freezes_is_skipped_and_asked_again_when_it_is_back(
    server: servers.Addressed, way: str
) -> None:
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
async def test_options_of_the_url_do_not_change_what_comes_back(redis_url: str, options: str) -> None:
    async with cache_at(f"{redis_url}?{options}") as cache:
        cache.put("name", b"\xff value", 60)
        assert await cache.get("name") == b"\xff value"


async def test_the_database_may_be_named_by_an_option(redis_url: str) -> None:
    address, _, database = redis_url.rpartition("/")
    async with cache_at(redis_url) as cache, cache_at(f"{address}?db={database}") as same:
        cache.put("name", b"value", 60)
        assert await cache.get("name") == b"value"
        assert await same.get("name") == b"value"


async def test_a_refused_command_does_not_spoil_the_other_answers(cache: Cache, redis_url: str) -> None:
    cache.put("copy", b"value", 60)
    assert await cache.get("copy") == b"value"
    async with Client.from_url(redis_url) as client:
        await client.lpush("rate", "no number")
    answers = await asyncio.gather(cache.count("rate", 60), cache.get("copy"), cache.count("other", 60))
    assert list(answers) == [None, b"value", 1]

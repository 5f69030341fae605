"""Each tenant has one quota for all processes. Without Redis each process counts alone, and no request fails."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from app.auth.rate_limit import RateLimit
from app.cache import Cache
from app.errors import TooManyRequests
from tests.harness import servers
from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.wait import AMPLE_SECONDS

NOWHERE = "/orders/01890a5d-ac96-774b-bcce-b302099a8057"
JWT = {"auth_mode": "jwt", "auth_jwt_secret": SECRET}
NOON = 1_800_000_000.0  # the start of an hour


@contextlib.asynccontextmanager
async def cache_at(
    url: str, timeout_seconds: float = AMPLE_SECONDS, pause_seconds: float = 2.0
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


async def test_a_quota_is_counted_down_and_then_refused(database_url: str, redis_url: str) -> None:
    """Requests beyond the quota are a 429 until the window ends."""
    async with serving(database_url, rate_limit="2/day", redis_url=redis_url) as api:
        first, second, third = [await api.get(NOWHERE) for _ in range(3)]
        told = await api.get("/metrics")
    assert [each.status_code for each in (first, second, third)] == [404, 404, 429]
    assert_problem(third, 429, "too-many-requests")
    for answer, remaining in ((first, 1), (second, 0), (third, 0)):
        assert answer.headers["ratelimit-policy"] == '"default";q=2;w=86400'
        state, reset = answer.headers["ratelimit"].rsplit(";t=", 1)
        assert state == f'"default";r={remaining}'
        assert 0 < int(reset) <= 86_400
    assert int(third.headers["retry-after"]) == int(reset)
    assert "ratelimit" not in told.headers


async def test_answers_show_the_remaining_quota(database_url: str) -> None:
    """An admitted request has them too."""
    async with serving(database_url, rate_limit="5/day") as api:
        answer = await api.post("/orders", json={"sku": "WIDGET", "quantity": 1, "unit_price": 1})
    assert (answer.status_code, answer.headers["ratelimit"].startswith('"default";r=4;t=')) == (201, True)


async def test_without_a_limit_there_are_no_headers(api: httpx.AsyncClient) -> None:
    """Without RATE_LIMIT no answer has rate limit headers."""
    assert not [name for name in (await api.get(NOWHERE)).headers if name.startswith("ratelimit")]


async def test_health_metrics_and_docs_are_never_limited(database_url: str) -> None:
    """They need no quota."""
    async with serving(database_url, rate_limit="1/day") as api:
        for _ in range(3):
            for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
                assert (await api.get(path)).status_code == 200


async def test_tenants_have_separate_quotas(database_url: str) -> None:
    """A tenant that uses up its quota does not affect another."""
    async with serving(database_url, rate_limit="1/day", **JWT) as api:
        for _ in range(2):
            spent = await api.get(NOWHERE, headers=bearer(token(tenant="acme")))
        assert spent.status_code == 429
        assert (await api.get(NOWHERE, headers=bearer(token(tenant="globex")))).status_code == 404
        assert (await api.get(NOWHERE)).status_code == 401


async def test_two_processes_share_one_quota(cache: Cache, redis_url: str) -> None:
    """Redis counts for both."""
    async with cache_at(redis_url) as another_cache:
        one, other = (RateLimit("3/day", each, clock=lambda: NOON) for each in (cache, another_cache))
        counted = [(await each.count("acme")).count for each in (one, other, one, other)]
        assert counted == [1, 2, 3, 4]
        with pytest.raises(TooManyRequests):
            (await one.count("acme")).check()


async def test_concurrent_requests_are_each_counted_once(cache: Cache) -> None:
    """Each request gets its own count, apart for each tenant."""
    limit = RateLimit("1000/day", cache, clock=lambda: NOON)
    quotas = await asyncio.gather(*(limit.count("acme") for _ in range(100)), limit.count("globex"))
    assert sorted(quota.count for quota in quotas) == [1, *range(1, 101)]


async def test_a_count_expires_with_its_window(cache: Cache, redis_url: str) -> None:
    """The key in Redis expires when the window ends."""
    await RateLimit("3/minute", cache, clock=lambda: NOON).count("acme")
    async with Redis.from_url(redis_url) as redis:
        [name] = await redis.keys()
        assert 0 < await redis.ttl(name) <= 60


async def test_the_quota_resets_when_promised(cache: Cache) -> None:
    """The quota is whole again when `RateLimit` and `Retry-After` say so."""
    now = NOON + 13.5
    limit = RateLimit("1/minute", cache, clock=lambda: now)
    await limit.count("acme")
    spent = await limit.count("acme")
    with pytest.raises(TooManyRequests) as caught:
        spent.check()
    assert caught.value.retry_after_seconds == spent.reset_seconds == 47
    now += spent.reset_seconds
    assert (await limit.count("acme")).count == 1


async def test_without_redis_each_process_counts_alone(server_directory: Path) -> None:
    """When Redis is back, the processes share the quota again."""
    async with (
        servers.redis(server_directory) as redis,
        cache_at(redis.url, pause_seconds=0.001) as patient,
        cache_at(redis.url, 0.1, 0.001) as impatient,
    ):
        limit, hasty = (RateLimit("3/day", each, clock=lambda: NOON) for each in (patient, impatient))
        assert [(await limit.count("acme")).count for _ in range(2)] == [1, 2]
        redis.freeze()
        assert [(await hasty.count("acme")).count for _ in range(2)] == [1, 2]
        redis.thaw()
        await redis.kill()
        assert [(await limit.count("acme")).count for _ in range(2)] == [1, 2]
        await redis.start()
        assert (await limit.count("acme")).count == 1


async def test_an_open_breaker_skips_redis(server_directory: Path) -> None:
    """The replay cache and the rate limit share one client, so they share its breaker."""
    async with servers.redis(server_directory) as redis, cache_at(redis.url, pause_seconds=3600) as cache:
        limit = RateLimit("3/day", cache, clock=lambda: NOON)
        await redis.kill()
        assert await cache.get("copy") is None
        await redis.start()
        assert [(await limit.count("acme")).count for _ in range(2)] == [1, 2]
        async with Redis.from_url(redis.url) as client:
            assert await client.dbsize() == 0


@pytest.mark.parametrize("url", ["redis://no-such-host.invalid/0", "redis://127.0.0.1:1/0"])
async def test_an_unreachable_redis_fails_no_request(database_url: str, url: str) -> None:
    """Requests are served, and counted in the process."""
    async with serving(database_url, rate_limit="1/day", redis_url=url) as api:
        assert [(await api.get(NOWHERE)).status_code for _ in range(2)] == [404, 429]

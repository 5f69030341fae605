"""Each tenant has a quota, the same for all processes; without Redis each process counts for itself, and none fails."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import BlockingConnectionPool

from app.api.rates import RateLimit, open_pool
from app.errors import TooManyRequests
from tests.harness import servers
from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.wait import AMPLE_SECONDS

NOWHERE = "/orders/01890a5d-ac96-774b-bcce-b302099a8057"
JWT = {"auth_mode": "jwt", "auth_jwt_secret": SECRET}
NOON = 1_800_000_000.0  # a round minute, hour and day would do as well


@pytest.fixture
async def connections(redis_url: str) -> AsyncIterator[BlockingConnectionPool]:
    pool = open_pool(redis_url, AMPLE_SECONDS)
    yield pool
    await pool.aclose()


async def test_a_quota_is_counted_down_and_then_refused_until_its_window_ends(
    database_url: str, redis_url: str
) -> None:
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


async def test_good_answers_tell_what_is_left(database_url: str) -> None:
    async with serving(database_url, rate_limit="5/day") as api:
        answer = await api.post("/orders", json={"sku": "WIDGET", "quantity": 1, "unit_price": 1})
    assert (answer.status_code, answer.headers["ratelimit"].startswith('"default";r=4;t=')) == (201, True)


async def test_without_a_limit_nothing_is_said_of_one(api: httpx.AsyncClient) -> None:
    assert not [name for name in (await api.get(NOWHERE)).headers if name.startswith("ratelimit")]


async def test_health_metrics_and_docs_are_never_limited(database_url: str) -> None:
    async with serving(database_url, rate_limit="1/day") as api:
        for _ in range(3):
            for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
                assert (await api.get(path)).status_code == 200


async def test_one_tenant_uses_up_its_own_quota_and_nobody_elses(database_url: str) -> None:
    async with serving(database_url, rate_limit="1/day", **JWT) as api:
        for _ in range(2):
            spent = await api.get(NOWHERE, headers=bearer(token(tenant="acme")))
        assert spent.status_code == 429
        assert (await api.get(NOWHERE, headers=bearer(token(tenant="globex")))).status_code == 404
        assert (await api.get(NOWHERE)).status_code == 401


async def test_two_processes_share_one_quota(connections: BlockingConnectionPool) -> None:
    one, other = (RateLimit("3/day", connections, clock=lambda: NOON) for _ in range(2))
    counted = [(await each.count("acme")).count for each in (one, other, one, other)]
    assert counted == [1, 2, 3, 4]
    with pytest.raises(TooManyRequests):
        (await one.count("acme")).check()


async def test_the_next_window_brings_a_whole_quota_just_when_it_was_promised(
    connections: BlockingConnectionPool,
) -> None:
    now = NOON + 13.5
    limit = RateLimit("1/minute", connections, clock=lambda: now)
    await limit.count("acme")
    spent = await limit.count("acme")
    with pytest.raises(TooManyRequests) as caught:
        spent.check()
    assert caught.value.retry_after_seconds == spent.reset_seconds == 47
    now += spent.reset_seconds
    assert (await limit.count("acme")).count == 1


async def test_while_redis_is_out_each_process_counts_for_itself_and_comes_back(server_directory: Path) -> None:
    async with servers.redis(server_directory) as redis:
        pools = open_pool(redis.url, AMPLE_SECONDS), open_pool(redis.url, 0.1)
        limit, impatient = (RateLimit("3/day", pool, clock=lambda: NOON, breaker_seconds=0.001) for pool in pools)
        assert [(await limit.count("acme")).count for _ in range(2)] == [1, 2]
        redis.freeze()
        assert [(await impatient.count("acme")).count for _ in range(2)] == [1, 2]
        redis.thaw()
        await redis.kill()
        assert [(await limit.count("acme")).count for _ in range(2)] == [1, 2]
        await redis.start()
        assert (await limit.count("acme")).count == 1
        for pool in pools:
            await pool.aclose()


async def test_while_the_breaker_is_open_nobody_waits_for_redis(server_directory: Path) -> None:
    asked = 0

    async with servers.redis(server_directory) as redis:
        pool = open_pool(redis.url, AMPLE_SECONDS)
        limit = RateLimit("3/day", pool, clock=lambda: NOON, breaker_seconds=3600)
        await redis.kill()
        await limit.count("acme")
        await redis.start()
        for _ in range(2):
            asked = (await limit.count("acme")).count
        await pool.aclose()
    assert asked == 3


@pytest.mark.parametrize("url", ["redis://no-such-host.invalid/0", "redis://127.0.0.1:1/0"])
async def test_a_redis_that_cannot_be_reached_is_no_reason_to_fail(database_url: str, url: str) -> None:
    async with serving(database_url, rate_limit="1/day", redis_url=url) as api:
        assert [(await api.get(NOWHERE)).status_code for _ in range(2)] == [404, 429]

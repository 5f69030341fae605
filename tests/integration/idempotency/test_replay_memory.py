"""A repeat byte for byte is answered from memory; any other request takes the ordinary way."""

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from app.db import Pool
from tests.harness.api import assert_problem, serving
from tests.harness.caches import copies_in
from tests.harness.identity import SECRET, bearer, token
from tests.harness.wait import AMPLE_SECONDS, wait_until

BODY = b'{"items":[{"sku":"WIDGET","quantity":3,"unit_price":"9.99"}]}'
HEADERS = {"Idempotency-Key": "k", "Content-Type": "application/json"}


async def place(
    api: httpx.AsyncClient, body: bytes = BODY, query: str = "", headers: Mapping[str, str] | None = None
) -> httpx.Response:
    return await api.post(f"/orders{query}", content=body, headers={**HEADERS, **(headers or {})})


def caller(tenant: str, **claims: Any) -> dict[str, str]:
    return bearer(token(tenant=tenant, **claims))


async def replays(api: httpx.AsyncClient, source: str) -> float:
    start = f'idempotency_cache_hits_total{{source="{source}"}} '
    [line] = [line for line in (await api.get("/metrics")).text.splitlines() if line.startswith(start)]
    return float(line.removeprefix(start))


async def test_a_repeat_needs_neither_redis_nor_postgres(api: httpx.AsyncClient, pool: Pool) -> None:
    """The answer is the same although the tables are empty."""
    first = await place(api)
    await pool.execute("TRUNCATE idempotency_keys, outbox, order_lines, orders CASCADE")
    again = await place(api)
    assert (again.status_code, again.content, again.headers["location"]) == (
        201,
        first.content,
        first.headers["location"],
    )
    for name in ("idempotent-replay", "idempotent-replayed"):
        assert (again.headers[name], first.headers.get(name)) == ("true", None)
    assert await replays(api, "memory") == 1


async def test_a_response_of_another_process_is_remembered(database_url: str) -> None:
    """The first repeat in this process is answered by Postgres, the second from memory."""
    async with serving(database_url) as api, serving(database_url) as other:
        await place(other)
        await place(api)
        await place(api)
        assert (await replays(api, "postgres"), await replays(api, "memory")) == (1, 1)


async def test_a_copy_from_redis_is_not_remembered(database_url: str, redis_url: str) -> None:
    """Its lifetime is on the clock of the process that wrote it, which may be wrong."""
    async with serving(database_url, redis_url=redis_url) as api, serving(database_url, redis_url=redis_url) as other:
        await place(other)
        await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
        await place(api)
        await place(api)
        assert (await replays(api, "redis"), await replays(api, "memory")) == (2, 0)


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (BODY + b" ", {}),
        (BODY, {"Content-Type": "application/json; charset=utf-8"}),
        (BODY, {"Idempotency-Key": '"k"'}),
    ],
)
async def test_another_spelling_gets_the_same_answer(
    api: httpx.AsyncClient, body: bytes, header: dict[str, str]
) -> None:
    """Whether or not the memory finds it: the key and the request are the same."""
    first = await place(api)
    again = await place(api, body, headers=header)
    assert (again.content, again.headers["idempotent-replay"]) == (first.content, "true")


async def test_another_request_with_the_key_is_refused(api: httpx.AsyncClient) -> None:
    """Another body or query is another request."""
    await place(api)
    await place(api)
    assert_problem(await place(api, BODY.replace(b"3", b"4")), 422, "idempotency-key-reused")
    assert_problem(await place(api, query="?a=1"), 422, "idempotency-key-reused")
    assert_problem(await place(api, headers={"Content-Type": "text/plain"}), 415, "unsupported-media-type")


async def test_tenants_do_not_share_responses(database_url: str) -> None:
    """The same key and body of another tenant is another order."""
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET) as api:
        first, other = (
            await place(api, headers=caller("a")),
            await place(api, headers=caller("b")),
        )
        assert first.headers["location"] != other.headers["location"]
        assert "idempotent-replay" not in other.headers
        assert (await place(api, headers=caller("a"))).content == first.content
        assert (await place(api, headers=caller("b"))).content == other.content
        assert_problem(await place(api), 401, "unauthorized")
        assert_problem(await place(api, headers=caller("a", scope="orders:read")), 403, "insufficient-scope")


async def test_a_replay_counts_for_the_rate_limit(database_url: str) -> None:
    """A tenant's quota is used up by repeats too."""
    async with serving(database_url, rate_limit="2/day") as api:
        assert [(await place(api)).status_code for _ in range(3)] == [201, 201, 429]


async def test_a_key_that_is_about_to_expire_is_left_to_postgres(database_url: str, pool: Pool) -> None:
    """A lifetime within the margin is never remembered; an expired key is free for the same request."""
    async with serving(database_url, idempotency_ttl_seconds=60) as api:
        first = await place(api)
        await place(api)
        assert (await replays(api, "postgres"), await replays(api, "memory")) == (1, 0)
        await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
        second = await place(api)
        assert (second.status_code, second.headers.get("idempotent-replay")) == (201, None)
        assert second.headers["location"] != first.headers["location"]


async def test_requests_without_a_key_are_not_remembered(api: httpx.AsyncClient) -> None:
    """Each one is an order of its own, also if its key is blank."""
    for key in ("", '""'):
        assert len({(await place(api, headers={"Idempotency-Key": key})).headers["location"] for _ in range(3)}) == 3

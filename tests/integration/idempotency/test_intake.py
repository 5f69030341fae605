"""Intake with Redis up, down, flushed, frozen or damaged, and with lost COMMITs: the answers are the same."""

import asyncio
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from redis.asyncio import Redis as Client

from app import db
from app.idempotency.key import IdempotencyKey
from app.messaging import outbox
from chaos.proxy import postgres
from chaos.proxy.faults import Lose
from chaos.proxy.proxy import Proxy
from tests.harness import servers
from tests.harness.api import assert_problem, serving
from tests.harness.caches import copies_in
from tests.harness.events import event
from tests.harness.orders import request_under_way, somebody_waits
from tests.harness.wait import AMPLE_SECONDS, wait_until

BODY = {"items": [{"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}]}
REPLAYS = "idempotency_cache_hits_total"
SPACES = itertools.count()


async def place(api: httpx.AsyncClient, key: str | None = "k", **more: object) -> httpx.Response:
    """Send the request, each time with other white space: the service's replay memory takes it for another one."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Idempotency-Key": key})
    return await api.post("/orders", content=json.dumps({**BODY, **more}) + " " * next(SPACES), headers=headers)


async def replays(api: httpx.AsyncClient, source: str) -> float:
    lines = (await api.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(f'{REPLAYS}{{source="{source}"}}')).split()[1])


def assert_same(first: httpx.Response, again: httpx.Response) -> None:
    assert (again.status_code, again.content, again.headers["location"]) == (
        first.status_code,
        first.content,
        first.headers["location"],
    )
    assert again.headers["idempotent-replay"] == "true"


@pytest.fixture
async def cached(database_url: str, redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url, redis_url=redis_url) as api:
        yield api


async def test_a_repeat_is_answered_from_the_cached_copy(cached: httpx.AsyncClient, redis_url: str) -> None:
    """The answer from Redis equals the first answer, byte for byte."""
    first = await place(cached)
    await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
    assert_same(first, await place(cached))
    assert (await replays(cached, "redis"), await replays(cached, "postgres")) == (1, 0)


async def test_another_request_with_a_copied_key_is_refused(cached: httpx.AsyncClient, redis_url: str) -> None:
    """A cached key also refuses another request."""
    await place(cached)
    await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
    assert_problem(await place(cached, customer_id="other"), 422, "idempotency-key-reused")


@pytest.mark.parametrize("hours", [24, 1], ids=["first answer", "replay"])
async def test_a_copy_expires_no_later_than_its_key(
    cached: httpx.AsyncClient, redis_url: str, pool: db.Pool, hours: int
) -> None:
    """The copy in Redis expires with the key's row or before it."""
    await place(cached)
    await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
    async with Client.from_url(redis_url) as client:
        if hours == 1:
            await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp() + interval '1 hour'")
            await client.flushdb()
            await place(cached)
            await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy of the replay")
        [name] = await client.keys()
        copy, kept_milliseconds = await client.get(name), await client.pttl(name)
    assert isinstance(copy, bytes)
    key_ends = await pool.fetchval("SELECT extract(epoch FROM expires_at)::float8 FROM idempotency_keys")
    assert json.loads(copy.split(b"\n")[1])["expires_at"] <= key_ends  # after that the copy is ignored
    assert 0 < kept_milliseconds <= hours * 3_600_000  # Redis deletes it then; it counts from the time of the write


async def test_a_flushed_redis_changes_no_answer(cached: httpx.AsyncClient, redis_url: str) -> None:
    """Without the copy the answer comes from Postgres."""
    first = await place(cached)
    async with Client.from_url(redis_url) as client:
        for _ in range(5):
            await client.flushdb()
            assert_same(first, await place(cached))


def changed(copy: bytes, old: bytes, new: bytes) -> bytes:
    """Return a copy with another content and a matching digest."""
    _, _, content = copy.partition(b"\n")
    assert old in content
    content = content.replace(old, new)
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "shortened": lambda copy: copy[:-1],
    "lengthened": lambda copy: copy + b" ",
    "nested": lambda _: b"[" * 5000,
    "nested, with a digest": lambda copy: changed(copy, b"{", b"[" * 5000),
    "infinite": lambda copy: changed(copy, b'"expires_at": 1', b'"expires_at": Infinity, "other": 1'),
    "status": lambda copy: changed(copy, b'"status": 201', b'"status": 42'),
    "not found": lambda copy: changed(copy, b'"status": 201', b'"status": 404'),
    "location not Latin": lambda copy: changed(copy, b'"location": "/', '"location": "/Łódź'.encode()),
    "location with a line end": lambda copy: changed(copy, b'"location": "/', b'"location": "/\\r\\nX-Evil: 1'),
    "large": lambda _: b"x" * 5_000_000,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_damaged_copy_is_ignored(
    cached: httpx.AsyncClient, redis_url: str, damage: Callable[[bytes], bytes]
) -> None:
    """A copy that cannot be read is ignored."""
    first = await place(cached)
    await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
    async with Client.from_url(redis_url) as client:
        [name] = await client.keys()
        copy = await client.get(name)
        assert isinstance(copy, bytes)
        await client.set(name, damage(copy))
    assert_same(first, await place(cached))
    assert (await replays(cached, "redis"), await replays(cached, "postgres")) == (0, 1)


async def test_a_redis_url_with_decoding_changes_no_answer(database_url: str, redis_url: str) -> None:
    """`decode_responses` in the URL has no effect."""
    async with serving(database_url, redis_url=redis_url + "?decode_responses=True", rate_limit="9/day") as api:
        first = await place(api)
        await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
        assert_same(first, await place(api))
        assert await replays(api, "redis") == 1


async def test_an_outdated_redis_is_not_trusted(cached: httpx.AsyncClient, redis_url: str, pool: db.Pool) -> None:
    """The old copy says that its key has expired. Postgres decides, whatever Redis has kept."""
    old = await place(cached)
    await wait_until(lambda: copies_in(redis_url), AMPLE_SECONDS, "the copy")
    async with Client.from_url(redis_url) as client:
        [name] = await client.keys()
        copy = await client.get(name)
        assert isinstance(copy, bytes)
        await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
        await client.set(name, changed(copy, b'"expires_at": 1', b'"expires_at": 0.1'))
        new = await place(cached)
    assert new.headers["location"] != old.headers["location"]


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_a_dead_or_frozen_redis_changes_no_answer(database_url: str, server_directory: Path, way: str) -> None:
    """Only the row of Redis in `/readyz` changes."""
    async with (
        servers.redis(server_directory) as server,
        serving(database_url, redis_url=server.url, redis_timeout_seconds=0.2) as api,
    ):
        first = await place(api)
        await server.kill() if way == "kill" else server.freeze()
        for _ in range(3):
            assert_same(first, await place(api))
        assert (await place(api, "other")).status_code == 201
        ready = await api.get("/readyz")
        rows = {row["name"]: row["status"] for row in ready.json()["checks"]}
        assert (ready.status_code, rows) == (200, {"postgres": "ok", "outbox": "ok", "redis": "degraded"})


async def test_a_repeat_gets_one_order_after_a_lost_commit(database_url: str, pool: db.Pool) -> None:
    """COMMITs or their answers are lost repeatedly; a client that retries ends with one order per key."""
    parts = urlsplit(database_url)
    proxy = Proxy(parts.hostname or "", parts.port or 0, frames=postgres, dice=random.Random(7))  # noqa: S311
    async with proxy, serving(proxy.url(database_url)) as api:
        lost = Lose(postgres.COMMIT_REQUEST, probability=0.2), Lose(postgres.COMMIT_ANSWER, probability=0.2)
        for fault in lost:
            proxy.arm(fault)
        answers = await asyncio.gather(*(until_placed(api, f"key-{number}") for number in range(40)))
        proxy.disarm()
        assert all(proxy.struck[fault] for fault in lost)
        for number, answer in enumerate(answers):
            assert_same(answer, await place(api, f"key-{number}"))
    assert await pool.fetchval("SELECT count(*) FROM orders") == 40


async def until_placed(api: httpx.AsyncClient, key: str) -> httpx.Response:
    while (answer := await place(api, key)).status_code == 503:
        assert answer.headers["retry-after"]
    assert answer.status_code == 201
    return answer


@pytest.mark.parametrize(("lose", "key"), [(fault, key) for fault in ("REQUEST", "ANSWER") for key in ("k", None)])
async def test_the_outcome_of_a_lost_commit_is_found(
    database_url: str, pool: db.Pool, lose: str, key: str | None
) -> None:
    """The service reads the outcome back, and the first answer is not marked as a replay."""
    parts = urlsplit(database_url)
    async with (
        Proxy(parts.hostname or "", parts.port or 0, frames=postgres) as proxy,
        serving(proxy.url(database_url)) as api,
    ):
        fault = Lose(getattr(postgres, f"COMMIT_{lose}"), times=1)
        proxy.arm(fault)
        answer = await place(api, key)
        assert proxy.struck[fault] == 1
    assert (answer.status_code, answer.headers.get("idempotent-replay")) == (201, None)
    orders = await pool.fetch("SELECT id FROM orders")
    assert [f"/orders/{row['id']}" for row in orders] == [answer.headers["location"]]
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 1


async def test_an_unknown_commit_is_a_503(database_url: str, pool: db.Pool) -> None:
    """A repeat with the same key gets the stored answer."""
    parts = urlsplit(database_url)
    async with (
        Proxy(parts.hostname or "", parts.port or 0, frames=postgres) as proxy,
        serving(proxy.url(database_url)) as api,
    ):
        proxy.arm(Lose(postgres.COMMIT_ANSWER))
        assert_problem(await place(api), 503, "database-unavailable")
        proxy.disarm()
        again = await place(api)
    assert again.headers["idempotent-replay"] == "true"
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_one_order_per_key_when_serializable(database_url: str, pool: db.Pool) -> None:
    """With SERIALIZABLE as the database's default, which would fail transactions that meet at a key."""
    name = database_url.rpartition("/")[2]
    await pool.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    async with serving(database_url) as api, serving(database_url) as other:
        answers = await asyncio.gather(*(place(each) for each in (api, other) * 10))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.content for answer in answers}) == 1
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_a_full_outbox_closes_intake(database_url: str, pool: db.Pool) -> None:
    """Orders get a 503 while the outbox is over its limit, and are accepted again when it is below."""
    async with db.transaction(pool) as conn:
        for _ in range(3):
            await outbox.add(conn, [event()])
    async with serving(database_url, outbox_max_pending=2) as api:
        await wait_until(lambda: is_closed(api), AMPLE_SECONDS, "refusal because of the outbox")
        answer = await place(api)
        assert_problem(answer, 503, "outbox-full")
        assert answer.headers["retry-after"]
        await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
        await wait_until(lambda: is_taken(api), AMPLE_SECONDS, "201")


async def test_a_known_key_is_answered_while_intake_is_closed(database_url: str, pool: db.Pool) -> None:
    """Redis has no copy here. A key of another request is refused as such, and a new key gets the 503."""
    async with serving(database_url, outbox_max_pending=2) as api:
        first = await place(api)
        async with db.transaction(pool) as conn:
            for _ in range(3):
                await outbox.add(conn, [event()])
        await wait_until(lambda: is_closed(api), AMPLE_SECONDS, "refusal because of the outbox")
        assert_same(first, await place(api))
        assert_problem(await place(api, customer_id="other"), 422, "idempotency-key-reused")
        assert_problem(await place(api, "new"), 503, "outbox-full")
        assert_problem(await api.get("/idempotency-keys/new"), 404, "idempotency-key-not-found")


async def is_closed(api: httpx.AsyncClient) -> bool:
    return bool((await place(api, None)).json().get("code") == "outbox-full")


async def is_taken(api: httpx.AsyncClient) -> bool:
    return (await place(api, None)).status_code == 201


async def test_requests_beyond_the_limit_are_refused_at_once(database_url: str, pool: db.Pool) -> None:
    """Requests beyond the concurrency limit get a 503; health and metrics are not limited."""
    held = IdempotencyKey("default", "k", b"another request", 1)
    patient = serving(database_url, http_max_in_flight=1, idempotency_wait_seconds=AMPLE_SECONDS)
    async with patient as api, request_under_way(pool, held) as other:
        waiting = asyncio.create_task(place(api))
        await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "a request under way")
        assert_problem(await place(api, None), 503, "overloaded")
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await api.get(path)).status_code == 200
        await other.rollback()
        assert (await waiting).status_code == 201


async def test_a_key_can_be_looked_up_until_it_expires(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """`GET /idempotency-keys/{key}` shows the stored response, and a 404 after the key has expired."""
    key = 'a/b?c%20"d'
    path = f"/idempotency-keys/{quote(key, safe='')}"
    assert_problem(await api.get(path), 404, "idempotency-key-not-found")
    placed = await place(api, key)
    told = (await api.get(path)).raise_for_status().json()
    assert (told["key"], told["status_code"], told["location"]) == (key, 201, placed.headers["location"])
    lifetime = datetime.fromisoformat(told["expires_at"]) - datetime.fromisoformat(told["created_at"])
    assert lifetime.total_seconds() == 86_400
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    assert_problem(await api.get(path), 404, "idempotency-key-not-found")


async def test_a_malformed_key_is_a_400(api: httpx.AsyncClient) -> None:
    """Looking up a malformed key is a 400."""
    assert_problem(await api.get(f"/idempotency-keys/{'k' * 256}"), 400, "idempotency-key-invalid")
    assert_problem(await api.get("/idempotency-keys/%C3%BC"), 400, "idempotency-key-invalid")

"""Requests that commit together: each gets its own response or its own error, and cannot harm its neighbours."""

import asyncio
from dataclasses import replace
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import pytest

from app import db
from app.api.orders.deps import stored_response
from app.errors import IdempotencyKeyReused, RequestInProgress
from app.idempotency import Idempotency, IdempotencyConfig
from app.idempotency.key import IdempotencyKey, bind
from app.idempotency.store import StoredResponse
from app.observability.signals import Signals
from app.orders import store as order_store
from app.orders.store import TracedOrder
from chaos.proxy import postgres
from chaos.proxy.faults import Lose
from chaos.proxy.proxy import Proxy
from tests.harness.orders import command, request_under_way
from tests.harness.wait import AMPLE_SECONDS

MANY = 30


def key(name: str, body: str = "") -> IdempotencyKey:
    return bind("default", name, "POST", "/orders", "", {"body": body})


class Requests:
    """Requests of one process that arrive at the same time."""

    def __init__(self, pool: db.Pool, wait_seconds: float = AMPLE_SECONDS) -> None:
        config = IdempotencyConfig(ttl_seconds=86_400, wait_seconds=wait_seconds, concurrency=10)
        self._idempotency = Idempotency(pool, None, config, Signals())

    def place(self, of: IdempotencyKey | None, **changes: Any) -> "asyncio.Task[StoredResponse]":
        row = order_store.new_order(command(**changes), {})
        return asyncio.create_task(self._run(of, row))

    async def _run(self, of: IdempotencyKey | None, row: TracedOrder) -> StoredResponse:
        response = stored_response(row.order, HTTPStatus.CREATED)
        return await self._idempotency.run(of, order_store.insert, lambda: (row, response))

    def place_many(self, **changes: Any) -> "list[asyncio.Task[StoredResponse]]":
        return [self.place(key(f"k{number}"), **changes) for number in range(MANY)]


async def count(pool: db.Pool, what: str) -> int:
    async with db.connection(pool) as conn:
        return int(await conn.fetchval(f"SELECT count({what}) FROM orders"))  # noqa: S608 - constants


async def test_concurrent_requests_share_commits(pool: db.Pool) -> None:
    """Every order is written once, with its key, lines and event, in far fewer transactions than there are orders."""
    responses = await asyncio.gather(*Requests(pool).place_many())
    assert await count(pool, "*") == len({response.location for response in responses}) == MANY
    assert await count(pool, "DISTINCT xmin::text") < MANY / 2
    query = """
        SELECT count(*) FROM orders o JOIN order_lines l ON l.order_id = o.id JOIN outbox e ON e.subject = o.id::text
        JOIN idempotency_keys k ON k.location = '/orders/' || o.id
    """
    async with db.connection(pool) as conn:
        assert await conn.fetchval(query) == MANY


async def test_requests_without_a_key_are_gathered_too(pool: db.Pool) -> None:
    """A batch may hold requests with and without a key."""
    requests = Requests(pool)
    await asyncio.gather(*requests.place_many(), *(requests.place(None) for _ in range(MANY)))
    assert await count(pool, "*") == 2 * MANY


async def test_a_row_that_postgres_refuses_fails_alone(pool: db.Pool) -> None:
    """Its neighbours commit; it gets its own error."""
    requests = Requests(pool)
    first, *others = requests.place_many()
    bad = requests.place(key("bad"), customer_id="a NUL: \0")
    await asyncio.gather(first, *others)
    with pytest.raises(Exception, match="withheld"):
        await bad
    assert await count(pool, "*") == MANY


async def test_keys_that_are_taken_are_replayed_or_refused_alone(pool: db.Pool) -> None:
    """In one batch: new keys, a known key with the same request, and one with another request."""
    first = await Requests(pool).place(key("known"))
    requests = Requests(pool)
    again, other, *new = [requests.place(key("known")), requests.place(key("k0", "else")), *requests.place_many()]
    assert (await again) == replace(first, replayed=True, remaining_seconds=(await again).remaining_seconds)
    results = await asyncio.gather(other, *new, return_exceptions=True)
    assert [type(result) for result in results].count(IdempotencyKeyReused) == 1
    assert await count(pool, "*") == 1 + MANY


async def test_an_expired_key_is_taken_over_in_a_batch(pool: db.Pool) -> None:
    """It gets a new order, like a new key."""
    first = await asyncio.gather(*Requests(pool).place_many())
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    second = await asyncio.gather(*Requests(pool).place_many())
    assert not {response.location for response in first} & {response.location for response in second}
    assert await count(pool, "*") == 2 * MANY


async def test_a_key_that_another_process_holds_does_not_delay_its_neighbours(pool: db.Pool) -> None:
    """They commit while it is still held; its own request waits, and is refused when its time is over."""
    requests = Requests(pool, wait_seconds=5.0)
    async with request_under_way(pool, key("held")):
        held = requests.place(key("held"))
        await asyncio.gather(*requests.place_many())
        assert not held.done()
        with pytest.raises(RequestInProgress):
            await held
    assert await count(pool, "*") == MANY


@pytest.mark.parametrize("frame", [postgres.COMMIT_ANSWER, postgres.COMMIT_REQUEST], ids=["answer", "request"])
async def test_an_unknown_commit_is_resolved_for_each_request(database_url: str, frame: str, pool: db.Pool) -> None:
    """Whether the batch committed or not, each request gets its own order, once."""
    parts, lost = urlsplit(database_url), Lose(frame, times=2)
    async with (
        Proxy(parts.hostname or "", parts.port or 0, frames=postgres) as proxy,
        db.open_pool(proxy.url(database_url), 10) as proxied,
    ):
        requests = Requests(proxied)
        await requests.place(None)
        proxy.arm(lost)
        responses = await asyncio.gather(*requests.place_many(), *(requests.place(None) for _ in range(MANY)))
        assert proxy.struck[lost] == 2
    assert not any(response.replayed for response in responses)
    assert len({response.location for response in responses}) == 2 * MANY
    assert await count(pool, "*") == 2 * MANY + 1

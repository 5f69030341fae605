"""Bodies that arrive slowly only disturb other bodies of the same sender."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from app.db import Pool
from app.idempotency.key import IdempotencyKey
from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.orders import request_under_way, somebody_waits
from tests.harness.sockets import dialled, statuses
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}
BODY = json.dumps(LINE).encode()
HEAD = f"HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(BODY)}\r\n"
PLACES = 4  # so two bodies of one sender may arrive at a time
SLOW = 6


def head_of(**headers: str) -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n{fields}\r\n".encode()


class Slow:
    """A request whose body the service waits for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def begin(self, **headers: str) -> None:
        """Send the head, and wait for `100 Continue`."""
        self._writer.write(head_of(Expect="100-continue", **headers))
        assert await self.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"

    async def status(self) -> int:
        """Return the status of the answer."""
        return statuses(await self.reader.readuntil(b"\r\n\r\n"))[0]

    async def end(self) -> int:
        """Send the body, and return the status of the answer."""
        self._writer.write(BODY)
        return await self.status()


@pytest.fixture
async def guarded(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    patient = {"http_max_in_flight": PLACES, "http_body_timeout_seconds": 2 * AMPLE_SECONDS}
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, **patient) as api:
        yield api


@pytest.fixture
async def open_api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    patient = {"http_max_in_flight": PLACES, "http_body_timeout_seconds": 2 * AMPLE_SECONDS}
    async with serving(database_url, **patient) as api:
        yield api


async def at_once(stack: contextlib.AsyncExitStack, api: httpx.AsyncClient, **headers: str) -> int:
    """Send head and body in one piece, and return the status of the answer."""
    reader, writer = await stack.enter_async_context(dialled(api))
    writer.write(head_of(**headers) + BODY)
    return statuses(await reader.readuntil(b"\r\n\r\n"))[0]


async def begun(
    stack: contextlib.AsyncExitStack, api: httpx.AsyncClient, peer: str = "127.0.0.1", **headers: str
) -> Slow:
    slow = Slow(*await stack.enter_async_context(dialled(api, peer=peer)))
    await slow.begin(**headers)
    return slow


async def test_slow_bodies_affect_only_their_tenant(guarded: httpx.AsyncClient) -> None:
    """Of one tenant's bodies the newest stay; the others get a 503 at once."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(AMPLE_SECONDS):
        neighbour = await begun(stack, guarded, **bearer(token(tenant="globex")))
        slow = [await begun(stack, guarded, **bearer(token())) for _ in range(SLOW)]
        for tenant in ("globex", "acme"):
            assert await at_once(stack, guarded, **bearer(token(tenant=tenant))) == 201
        assert [await each.status() for each in slow[:-2]] == [503] * (SLOW - 2)  # a body that is here replaces none
        assert [await each.end() for each in (neighbour, *slow[-2:])] == [201] * 3


async def test_a_body_after_its_head_replaces_the_oldest(guarded: httpx.AsyncClient) -> None:
    """A prompt sender whose body follows its head gets through."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(AMPLE_SECONDS):
        first, second, prompt = [await begun(stack, guarded, **bearer(token())) for _ in range(3)]
        assert await prompt.end() == 201
        assert await first.status() == 503
        assert await second.end() == 201


async def test_without_tokens_each_address_has_its_share(open_api: httpx.AsyncClient) -> None:
    """Slow bodies of one address do not affect another."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(AMPLE_SECONDS):
        neighbour = await begun(stack, open_api)
        slow = [await begun(stack, open_api, "127.0.0.2") for _ in range(SLOW)]
        assert [await each.status() for each in slow[:-2]] == [503] * (SLOW - 2)
        assert [await each.end() for each in (neighbour, *slow[-2:])] == [201] * 3


async def test_a_replaced_body_is_a_503_with_retry_after(open_api: httpx.AsyncClient) -> None:
    """The sender of a replaced body may retry."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(AMPLE_SECONDS):
        first = await begun(stack, open_api)
        for _ in range(2):
            await begun(stack, open_api)
        head = (await first.reader.readuntil(b"\r\n\r\n")).decode()
        body = await first.reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
    assert "retry-after: 1" in head
    assert json.loads(body)["code"] == "overloaded"


async def test_a_slot_is_acquired_when_the_body_is_complete(database_url: str, pool: Pool) -> None:
    """While the body arrives the request holds no slot."""
    patient = {"http_max_in_flight": 1, "http_body_timeout_seconds": 2 * AMPLE_SECONDS}
    async with serving(database_url, **patient) as api, contextlib.AsyncExitStack() as stack:
        slow = await begun(stack, api)
        async with request_under_way(pool, IdempotencyKey("default", "k", b"", 1)):
            waiting = asyncio.create_task(api.post("/orders", json=LINE, headers={"Idempotency-Key": "k"}))
            await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "a request in the only place")
            assert await slow.end() == 503
        assert (await waiting).status_code == 201
        assert (await api.post("/orders", json=LINE)).status_code == 201


@pytest.mark.parametrize("path", ["/orders", "/ops/dlq/purge"])
async def test_a_bad_token_is_refused_before_its_body_is_read(guarded: httpx.AsyncClient, path: str) -> None:
    """The service answers 401 to the head alone, and does not ask for the body."""
    async with dialled(guarded) as (reader, writer), asyncio.timeout(AMPLE_SECONDS):
        writer.write(f"POST {path} {HEAD}Authorization: Bearer x\r\n\r\n".encode())
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [401]
    assert_problem(await guarded.post("/orders", json=LINE), 401, "unauthorized")

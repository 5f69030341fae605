"""Bodies that arrive slowly are in the way of whoever sends them, and of no other tenant or address."""

import asyncio
import socket
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.raw_http import statuses
from tests.harness.wait import AMPLE_SECONDS, wait_until

PLACES = 4
SHARE = PLACES // 2
SLOW = 10
ORDER = {"sku": "WIDGET", "quantity": 1, "unit_price": 1}
OTHER_ADDRESS = "127.0.0.2"


def head(authorization: str = "") -> bytes:
    line = f"Authorization: {authorization}\r\n" if authorization else ""
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n{line}"
    return f"POST /orders HTTP/1.1\r\n{fields}\r\n{{".encode()


async def send_slowly(api: httpx.AsyncClient, stack: AsyncExitStack, data: bytes, address: str = "127.0.0.1") -> int:
    """Send the beginning of SLOW bodies; return how many were refused, when all but a share were."""
    readers = []
    for _ in range(SLOW):
        client = socket.create_connection(("127.0.0.1", api.base_url.port), source_address=(address, 0))
        reader, writer = await asyncio.open_connection(sock=client)
        stack.callback(writer.close)
        writer.write(data)
        readers.append(asyncio.create_task(reader.readuntil(b"}")))
    await wait_until(lambda: sum(task.done() for task in readers) == SLOW - SHARE, AMPLE_SECONDS, "refusals")
    refused = [task for task in readers if task.done()]
    for task in readers:
        task.cancel()
    assert {status for task in refused for status in statuses(task.result())} == {503}
    return len(refused)


async def test_a_tenants_slow_bodies_hold_no_place_of_another(database_url: str) -> None:
    settings = {"http_max_in_flight": PLACES, "http_body_timeout_seconds": 3600}
    async with (
        serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, **settings) as api,
        AsyncExitStack() as stack,
    ):
        acme, globex = (bearer(token(tenant=tenant)) for tenant in ("acme", "globex"))
        assert await send_slowly(api, stack, head(acme["Authorization"])) == SLOW - SHARE
        assert (await api.post("/orders", json=ORDER, headers=globex)).status_code == 201
        assert_problem(await api.post("/orders", json=ORDER, headers=acme), 503, "overloaded")


async def test_without_tokens_an_addresss_slow_bodies_hold_no_place_of_another(database_url: str) -> None:
    async with (
        serving(database_url, http_max_in_flight=PLACES, http_body_timeout_seconds=3600) as api,
        AsyncExitStack() as stack,
    ):
        assert await send_slowly(api, stack, head(), OTHER_ADDRESS) == SLOW - SHARE
        assert (await api.post("/orders", json=ORDER)).status_code == 201


@pytest.mark.parametrize("given", ["Bearer nonsense", "Basic eDp5"])
async def test_a_bad_token_is_refused_before_its_body_is_read(database_url: str, given: str) -> None:
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, http_body_timeout_seconds=3600) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.base_url.port)
        writer.write(head(given))
        async with asyncio.timeout(AMPLE_SECONDS):
            assert statuses(await reader.readuntil(b"}")) == [401]
        writer.close()

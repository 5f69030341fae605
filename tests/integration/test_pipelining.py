"""Requests sent without waiting for answers, and offers of other protocols: each is served whole, one by one."""

import asyncio
import gc
import json
from contextlib import AsyncExitStack
from itertools import pairwise

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tests.harness.api import serving
from tests.harness.raw_http import dialled, heard, statuses
from tests.harness.wait import AMPLE_SECONDS

ORDER = json.dumps({"sku": "WIDGET", "quantity": 1, "unit_price": 1}).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ORDER), ORDER)
OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n",
    "any": b"upgrade: foo/1\r\nconnection: upgrade\r\n",
}
LAST = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def order(offer: bytes, body: str) -> bytes:
    """Return a request to place an order, whose body looks like another request to who skips it."""
    head = b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + offer
    if body == "chunked":
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(ORDER), ORDER)


async def answers(api: httpx.AsyncClient, *parts: bytes) -> list[int]:
    """Send these bytes, and return the statuses of all answers until the server closes."""
    async with dialled(api) as (reader, writer), asyncio.timeout(AMPLE_SECONDS):
        hearing = asyncio.create_task(heard(reader))
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        return statuses(await hearing)


@pytest.mark.parametrize("body", ["length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
async def test_an_offer_to_upgrade_is_ignored(api: httpx.AsyncClient, offer: bytes, body: str) -> None:
    """The order is placed, body and all, and what follows on the connection is served."""
    sent = order(offer, body) * 2 + LAST
    assert await answers(api, sent) == [201, 201, 200]
    assert await answers(api, *(sent[at : at + 1] for at in range(len(sent)))) == [201, 201, 200]


async def test_a_body_behind_an_offer_is_never_a_request(api: httpx.AsyncClient) -> None:
    smuggled = b"DELETE /orders HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
        smuggled
    )
    assert await answers(api, head + OFFERS["h2c"] + b"\r\n" + smuggled + LAST) == [400, 200]


async def test_connect_is_refused(api: httpx.AsyncClient) -> None:
    assert await answers(api, b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + LAST) == [400]


async def test_requests_sent_at_once_are_each_answered(api: httpx.AsyncClient) -> None:
    """In order, and none is lost, with bodies of both kinds between them, however they are cut."""
    sent = b"".join(order(b"", kind) + LAST.replace(b"close", b"keep-alive") for kind in ("length", "chunked") * 20)
    sent += LAST
    expected = [201, 200] * 40 + [200]
    assert await answers(api, sent) == expected
    cuts = [0, *range(1, len(sent), 97), len(sent)]
    assert await answers(api, *(sent[begin:end] for begin, end in pairwise(cuts))) == expected


async def test_no_request_is_parsed_before_the_one_before_is_answered(database_url: str) -> None:
    """However many are sent at once: what the service has not read stays with the sender."""

    def cycles() -> int:
        return sum(isinstance(each, RequestResponseCycle) for each in gc.get_objects())

    async with serving(database_url) as api, AsyncExitStack() as stack, asyncio.timeout(AMPLE_SECONDS):
        before, most = cycles(), 0
        streams = [await stack.enter_async_context(dialled(api)) for _ in range(5)]
        for _, writer in streams:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 100_000)
        for _ in range(50):
            for reader, _ in streams:
                await reader.readuntil(b'{"status":"ok"}')
            most = max(most, cycles() - before)
        for _, writer in streams:
            writer.transport.abort()
    assert most < 50

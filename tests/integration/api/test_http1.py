"""Requests of one connection are read one after the other, and offers of other protocols are ignored."""

import asyncio
import gc
import json
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.server.http1 import PIECE_BYTES
from app.api.server.http_protocol import GuardedProtocol
from app.db import Pool
from tests.harness.api import serving
from tests.harness.orders import placed
from tests.harness.sockets import dialled, get, problem, said, statuses
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDER = json.dumps({"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}).encode()
LAST = get(b"/livez", b"Connection: close")
H2C = b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def post(body: bytes, fields: bytes = b"", *, chunked: bool = False, version: bytes = b"1.1") -> bytes:
    """Return a request to place an order."""
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    return b"POST /orders HTTP/%b\r\nHost: x\r\n%b%b\r\n\r\n%b" % (version, fields, framing, sent)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0", b"foo, h2c"])
async def test_an_offer_to_upgrade_is_ignored(
    api: httpx.AsyncClient, pool: Pool, protocol: bytes, chunked: bool
) -> None:
    """The request is served with its body, and the connection stays usable."""
    offer = H2C.replace(b"h2c", protocol, 1)
    request = post(ORDER, offer, chunked=chunked)
    trailed = post(ORDER, chunked=True)[:-2] + offer + b"\r\n"
    answers = await said(api, request + trailed + get(b"/livez", offer.strip()) + LAST)
    assert statuses(answers) == [201, 201, 200, 200]
    assert await pool.fetchval("SELECT count(*) FROM orders") == 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_never_the_next_request(api: httpx.AsyncClient, pool: Pool, chunked: bool) -> None:
    """The bytes of a body are never parsed as a request."""
    answers = await said(api, post(post(ORDER), H2C, chunked=chunked) + LAST)
    assert statuses(answers) == [400, 200]
    assert await pool.fetchval("SELECT count(*) FROM orders") == 0


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_offer_may_come_in_any_two_parts(api: httpx.AsyncClient, chunked: bool) -> None:
    """The result does not depend on where the bytes are split."""
    request = post(b"{}", H2C, chunked=chunked)
    async with dialled(api) as (reader, writer), asyncio.timeout(AMPLE_SECONDS):
        for at in range(1, len(request)):
            for part in (request[:at], request[at:]):
                writer.write(part)
                await asyncio.sleep(0)  # let the server, on this thread, read what has arrived
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 422 ")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))


async def test_http_1_0_needs_no_host_and_ends_the_connection(api: httpx.AsyncClient) -> None:
    """HTTP/1.0 works without Host, and its connection closes."""
    for fields in (b"", b"Host: x\r\n", H2C):
        assert statuses(await said(api, b"GET /livez HTTP/1.0\r\n%b\r\n" % fields)) == [200]


async def test_pipelined_requests_are_answered_in_order(api: httpx.AsyncClient) -> None:
    """Each pipelined request gets its own answer, in order."""
    assert statuses(await said(api, get() + post(ORDER) + get(b"/nowhere") + LAST)) == [200, 201, 404, 200]
    assert statuses(await said(api, get() + get(b"/" + b"a" * 9000) + get())) == [200, 414]
    broken = b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n"
    answers = await said(api, post(ORDER, chunked=True) + broken)
    assert statuses(answers) == [201, 400]
    problem(answers[answers.rindex(b"HTTP/1.1 400") :], 400, "malformed-request")


async def test_a_request_ends_where_a_piece_of_it_ends(api: httpx.AsyncClient) -> None:
    """The parser is fed in pieces. Whichever byte of a head is the last of a piece, the next request waits."""
    broken = post(ORDER, chunked=True).partition(b"\r\n\r\n")[0] + b"\r\n\r\nno number\r\n"
    shortest = len(get(b"/livez", b"X-Pad: "))
    for size in range(PIECE_BYTES - 8, PIECE_BYTES + 9):
        first = get(b"/livez", b"X-Pad: " + b"x" * (size - shortest))
        assert len(first) == size
        assert statuses(await said(api, first + broken)) == [200, 400], size


def living(kind: type[Any]) -> list[Any]:
    return [each for each in gc.get_objects() if isinstance(each, kind)]


async def test_pipelined_requests_wait_unparsed(api: httpx.AsyncClient, pool: Pool) -> None:
    """While a request is handled, the bytes behind it are not parsed and the socket is not read; then each is
    answered.
    """
    order = await placed(pool)
    many = 500
    held = get(b"/orders/%b" % str(order.id).encode(), b"Prefer: wait=30")
    before = len(living(RequestResponseCycle))
    async with dialled(api, held + get() * many + LAST) as (reader, _), asyncio.timeout(AMPLE_SECONDS):

        def paused() -> bool:
            transports = [each.transport for each in living(GuardedProtocol) if each.transport]
            return any(not (each.is_reading() or each.is_closing()) for each in transports)

        await wait_until(paused, AMPLE_SECONDS, "end of the reading")
        assert len(living(RequestResponseCycle)) <= before + 1
        assert (await api.post(f"/orders/{order.id}/cancel")).status_code == 200  # end the wait of the first request
        assert statuses(await reader.read()) == [200] * (many + 2)


async def test_a_waiting_head_has_its_deadline_later(database_url: str, pool: Pool) -> None:
    """The deadline starts after the answer before it: while the service does not read, no time counts."""
    order = await placed(pool)
    held = get(b"/orders/%b" % str(order.id).encode(), b"Prefer: wait=1")
    async with serving(database_url, http_header_timeout_seconds=0.1) as api:
        answers = await said(api, first=held + get() + b"GET /livez HTTP/1.1\r\n")
    assert statuses(answers) == [200, 200, 408]

"""Limits below the application: heads that are too large or too slow, and too many connections."""

import asyncio
import contextlib
import gc
import select
import socket
from typing import Any

import httpx
import pytest

from app.api.server import listener as server_listener
from app.api.server.http_protocol import RESET, GuardedProtocol
from app.main import make_server
from app.settings import Settings, load
from tests.harness.api import serving
from tests.harness.sockets import dialled, get, heard, problem, said, statuses
from tests.harness.wait import AMPLE_SECONDS, wait_until

HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LATE = 0.1  # seconds for a head, in tests of that deadline


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([get(b"/" + b"a" * 8192)], 414, "target-too-long"),
        ([get(b"/livez?" + b"a" * 1_000_000)], 414, "target-too-long"),
        ([b"GET /", *[b"a" * 4096] * 400], 414, "target-too-long"),
        ([get(b"/livez", b"A: " + b"a" * 16_384)], 431, "headers-too-large"),
        ([get(b"/livez", *[b"A: %d" % n for n in range(4000)])], 431, "headers-too-large"),
        ([HEAD + b"A: ", *[b"a" * 4096] * 1000], 431, "headers-too-large"),
        ([HEAD, *[b"A" * 4096] * 1000], 431, "headers-too-large"),
        ([b"\r\n" * 100_000], 431, "headers-too-large"),
        ([b"nonsense\r\n\r\n"], 400, "malformed-request"),
        ([b"GET nowhere HTTP/1.1\r\n\r\n"], 400, "malformed-request"),
        ([b"GET /livez HTTP/1.1\r\n\r\n"], 400, "malformed-request"),
        ([get(b"/livez", b"host: x")], 400, "malformed-request"),
        ([get(b"/livez", b"Host: y").replace(b"/1.1", b"/1.0")], 400, "malformed-request"),
        ([get().replace(b"Host: x", b"Host: x y")], 400, "malformed-request"),
        ([b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", get()], 405, "method-not-allowed"),
        ([b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"], 400, "malformed-request"),
        ([b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"], 400, "malformed-request"),
        ([POST, b"no number\r\n"], 400, "malformed-request"),
        ([POST, b"1" + b";x" * 100_000], 431, "headers-too-large"),
        ([POST, b"1\r\n{\r\n0\r\n", *[b"T: " + b"t" * 1000 + b"\r\n"] * 100], 431, "headers-too-large"),
    ],
)
async def test_a_head_beyond_its_limits_is_a_problem(
    api: httpx.AsyncClient, parts: list[bytes], status: int, code: str
) -> None:
    """A target or headers beyond the limit are refused while they arrive."""
    problem(await said(api, *parts), status, code)
    assert (await api.get("/livez")).status_code == 200


async def test_a_refusal_reaches_a_client_that_sends_first(api: httpx.AsyncClient) -> None:
    """The server keeps reading for a moment: closing with unread bytes would lose the answer."""

    async def answered() -> bytes:
        async with dialled(api) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                for part in (HEAD, *[b"A" * 4096] * 1000):
                    writer.write(part)
                    await writer.drain()
                return await reader.read()
        return b""  # the machine stalled for longer than the server lingers

    problem(await wait_until(answered, AMPLE_SECONDS, "an answer"), 431, "headers-too-large")


async def test_a_head_of_exactly_the_limits_is_read(api: httpx.AsyncClient) -> None:
    """A head of the maximum size is accepted."""
    target = "/livez?" + "a" * (8192 - len("/livez?"))
    assert (await api.get(target, headers={"A": "a" * 15_000})).status_code == 200


async def test_a_trailer_is_no_header(api: httpx.AsyncClient) -> None:
    """A header after the body is dropped."""
    order = b'{"sku": "a", "quantity": 1, "unit_price": 1}'
    head = POST.replace(b"Host", b"Connection: close\r\nHost")
    answer = await said(api, head, b"%x\r\n%b\r\n0\r\nIdempotency-Key: two words\r\n\r\n" % (len(order), order))
    assert answer.startswith(b"HTTP/1.1 201 ")


@pytest.mark.parametrize("start", [b"G", HEAD, HEAD + b"A: b", b"\r\n"])
async def test_a_late_head_is_a_408(database_url: str, start: bytes) -> None:
    """A head that does not arrive in time is a 408, and the connection closes."""
    async with serving(database_url, http_header_timeout_seconds=LATE) as api:
        problem(await said(api, first=start), 408, "header-timeout")


async def test_a_silent_connection_is_closed(database_url: str) -> None:
    """A connection without any bytes is closed without an answer."""
    async with serving(database_url, http_header_timeout_seconds=LATE) as api:
        assert await said(api) == b""


async def test_the_next_head_on_a_connection_has_a_deadline_too(database_url: str) -> None:
    """The deadline of a head also applies to later requests of a connection."""
    async with serving(database_url, http_header_timeout_seconds=LATE) as api, dialled(api, get()) as (reader, writer):
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200")
        writer.write(HEAD)
        problem(await reader.read(), 408, "header-timeout")


async def trickle(writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
    """Keep sending bytes of a header, and never its end."""
    with contextlib.suppress(ConnectionError):
        while not over.is_set():
            writer.write(b"a")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.02)


async def test_a_trickling_head_is_a_408(database_url: str) -> None:
    """Single bytes do not extend the deadline of a head."""
    over = asyncio.Event()
    async with (
        serving(database_url, http_header_timeout_seconds=0.3) as api,
        dialled(api, HEAD + b"A: ") as (reader, writer),
    ):
        slow = asyncio.create_task(trickle(writer, over))
        problem(await heard(reader), 408, "header-timeout")
        over.set()
        await slow


async def test_an_unread_body_has_a_deadline(
    api: httpx.AsyncClient,
) -> None:
    """The rest of a body that no route reads cannot hold a connection forever."""
    answer = await said(api, POST.replace(b"/orders", b"/nowhere"))
    assert answer.startswith(b"HTTP/1.1 404 ")


async def open_ones(api: httpx.AsyncClient, count: int, stack: contextlib.AsyncExitStack) -> list[Any]:
    return [await stack.enter_async_context(dialled(api)) for _ in range(count)]


@pytest.mark.parametrize("rest", [b"no number\r\n", b"1" + b";x" * 100_000], ids=["broken", "too large"])
async def test_a_request_that_was_answered_early_gets_no_second_answer(api: httpx.AsyncClient, rest: bytes) -> None:
    """A malformed rest of a body closes the connection without a second answer."""
    early = POST.replace(b"application/json", b"text/plain")
    async with dialled(api, early) as (reader, writer), asyncio.timeout(AMPLE_SECONDS):
        answer = await reader.readuntil(b"}")
        assert statuses(answer) == [415]
        writer.write(rest)
        assert await reader.read() == b""


async def test_many_slow_sockets_replace_each_other(database_url: str) -> None:
    """At the limit a new connection replaces the one that has waited longest without a request."""
    async with (
        serving(database_url, http_max_connections=20) as api,
        contextlib.AsyncExitStack() as stack,
    ):
        assert (
            await api.get("/livez")
        ).status_code == 200  # the neighbour's connection has served a request, so it stays
        slow = await open_ones(api, 100, stack)
        for _, writer in slow:
            writer.write(HEAD)
        gone = asyncio.gather(*(reader.read() for reader, _ in slow[:70]), return_exceptions=True)
        assert len(await asyncio.wait_for(gone, AMPLE_SECONDS)) == 70  # later connections replaced the earlier ones
        for _ in range(20):
            order = {"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}
            assert (await api.post("/orders", json=order)).status_code == 201
        async with httpx.AsyncClient(base_url=api.base_url, trust_env=False, timeout=AMPLE_SECONDS) as newcomer:
            assert (await newcomer.get("/livez")).status_code == 200


async def test_busy_connections_are_not_replaced(database_url: str) -> None:
    """If all connections are serving requests, a new one gets a 503."""
    async with (
        serving(database_url, http_max_connections=2, http_body_timeout_seconds=60) as api,
        contextlib.AsyncExitStack() as stack,
    ):
        for reader, writer in await open_ones(api, 2, stack):
            writer.write(POST.replace(b"Host", b"Expect: 100-continue\r\nHost"))
            assert (
                await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            )  # the request is being served
        answer = await said(api)
        assert int(problem(answer, 503, "too-many-connections")["retry-after"]) > 0


async def test_a_client_that_does_not_read_is_cut_off(database_url: str) -> None:
    """Its connection is aborted after the deadline, and its slot becomes free."""
    settings: dict[str, Any] = {"http_answer_timeout_seconds": 0.2, "http_max_connections": 2}
    async with serving(database_url, **settings) as api:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", api.base_url.port))
            deaf.sendall(get(b"/openapi.json") * 60)
            poller = select.poll()
            poller.register(deaf, select.POLLHUP)
            ended = select.POLLHUP | select.POLLERR
            await wait_until(lambda: any(event & ended for _, event in poller.poll(0)), AMPLE_SECONDS, "end of it")
        assert (await api.get("/livez")).status_code == 200


BODY_LATER = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize(("request_", "rest"), [(get(), b""), (BODY_LATER, b"{}")], ids=["answered", "answered early"])
async def test_an_idle_connection_is_closed_after_its_time(database_url: str, request_: bytes, rest: bytes) -> None:
    """An idle connection is closed after the keep-alive time."""
    async with serving(database_url, http_keep_alive_seconds=1) as api, dialled(api) as (reader, writer):
        writer.write(request_)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 ")
        writer.write(rest)
        await asyncio.wait_for(reader.read(), AMPLE_SECONDS)


def test_idle_connections_outlive_those_of_proxies() -> None:
    """The default keep-alive time exceeds the 60 s that proxies commonly use."""
    settings = load(Settings, database_url="postgresql://127.0.0.1/orders", roles="api")
    with server_listener.listen("127.0.0.1", 0) as listener:
        assert make_server(settings, listener).config.timeout_keep_alive > 60


async def test_reset_connections_are_forgotten(api: httpx.AsyncClient) -> None:
    """A connection that its client reset leaves no object behind."""

    def remembered() -> int:
        return sum(isinstance(each, GuardedProtocol) for each in gc.get_objects())

    assert (await api.get("/livez")).status_code == 200
    before = remembered()
    for _ in range(10):
        async with dialled(api) as (reader, writer):
            writer.write(get())
            await reader.readuntil(b"\r\n\r\n")
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    await wait_until(lambda: gc.collect() >= 0 and remembered() <= before, AMPLE_SECONDS, "the end of their protocols")


def test_an_answer_is_not_delayed_by_nagle() -> None:
    """The body of a response does not wait for the acknowledgement of its head."""
    with server_listener.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

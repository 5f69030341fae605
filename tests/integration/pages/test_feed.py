"""The feed of live pages: one reading for all who watch, bounded streams, and none that is left behind."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from app.api import problems
from app.api.server import listener as server_listener
from app.errors import DatabaseUnavailable, OrderNotFound
from app.pages.feed import NOT_CURRENT, SHARE, Feed
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

PERIOD_SECONDS = 0.02
MANY_BYTES = 32 * 2**20  # more than the buffers of a connection hold


class Source:
    """What the pages show. It counts its readings, by page."""

    def __init__(self) -> None:
        self.readings: dict[str, int] = {}
        self.shown: Mapping[str, str] = {"title": "constant"}
        self.error: Exception | None = None
        self.seconds = 0.0  # of a reading

    async def read(self, name: str) -> Mapping[str, str]:
        if self.seconds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await asyncio.Event().wait()
        self.readings[name] = self.readings.get(name, 0) + 1
        if self.error is not None:
            raise self.error
        return self.shown


class Pages:
    """A server whose every path is a live page; the query may have `seconds` and `tenant`."""

    def __init__(self, http: httpx.AsyncClient, feed: Feed, source: Source) -> None:
        self.http = http
        self.feed = feed
        self.source = source

    @contextlib.asynccontextmanager
    async def watch(self, name: str, **query: str) -> AsyncIterator[AsyncIterator[tuple[str, str]]]:
        """Open a stream; lend its events, as name and data."""
        async with self.http.stream("GET", f"/{name}", params=query) as response:
            assert response.status_code == 200, await response.aread()
            yield events_of(response)

    async def status(self, name: str, **query: str) -> int:
        """Try to open a stream; return the status of the answer."""
        async with self.http.stream("GET", f"/{name}", params=query) as response:
            return response.status_code


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """Parse a stream."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif "event" in fields:
            yield fields["event"], fields.get("data", "")
            fields = {}


async def next_event(events: AsyncIterator[tuple[str, str]], name: str) -> str:
    """Skip other events; return the data of the next one of this name."""
    async with asyncio.timeout(AMPLE_SECONDS):
        return await anext(data async for event, data in events if event == name)


@contextlib.asynccontextmanager
async def serving_pages(**limits: Any) -> AsyncIterator[Pages]:
    feed, source = Feed(**{"period_seconds": PERIOD_SECONDS, **limits}), Source()
    app = FastAPI()
    problems.install(app)

    @app.get("/{name}")
    @app.head("/{name}")
    async def page(request: Request, name: str, seconds: float | None = None, tenant: str | None = None) -> Response:
        request.scope["state"]["is_head"] = request.method == "HEAD"
        return feed.answer(request, (name, tenant), lambda: source.read(name), seconds, tenant)

    with contextlib.closing(server_listener.listen("127.0.0.1", 0)) as listener:
        server = server_listener.Server(app, listener, 4, stopping=feed.stop)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await wait_until(lambda: server.started or task.done(), AMPLE_SECONDS, "start of the server")
            async with plain_http(f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
                yield Pages(http, feed, source)
        finally:
            server.should_exit = True
            await task
            await feed.close()


@pytest.fixture
async def pages() -> AsyncIterator[Pages]:
    async with serving_pages() as pages:
        yield pages


async def test_all_viewers_of_a_page_share_its_readings(pages: Pages) -> None:
    """With twenty streams, as with one, a page is read once in a period."""
    begun = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            events = await stack.enter_async_context(pages.watch("a"))
            assert json.loads(await next_event(events, "fragment")) == {"id": "title", "html": "constant"}
        await wait_until(lambda: pages.source.readings["a"] >= 10, AMPLE_SECONDS, "ten readings")
        periods = (time.monotonic() - begun) / PERIOD_SECONDS
    assert pages.source.readings["a"] <= periods + 1


async def test_slow_pages_are_read_less_often(pages: Pages) -> None:
    """Reading takes a fifth of the time at most."""
    pages.source.seconds = 0.1
    begun = time.monotonic()
    async with pages.watch("a"):
        await wait_until(lambda: pages.source.readings.get("a", 0) >= 3, AMPLE_SECONDS, "three readings")
    assert time.monotonic() - begun >= 2 * pages.source.seconds / SHARE


async def test_what_nobody_watches_is_not_read(pages: Pages) -> None:
    """When its last stream is closed, a page is not read again, though others are."""
    async with pages.watch("a") as events:
        await next_event(events, "fragment")
    await wait_until(lambda: pages.feed.count == 0, AMPLE_SECONDS, "end of the stream")
    before = pages.source.readings["a"]
    async with pages.watch("b"):
        await wait_until(lambda: pages.source.readings.get("b", 0) >= 5, AMPLE_SECONDS, "readings of another page")
    assert pages.source.readings["a"] <= before + 1  # the one that had begun


async def test_only_what_has_changed_is_sent(pages: Pages) -> None:
    """A fragment is sent at first, then when its HTML differs."""
    pages.source.shown = {"still": "same", "moving": "1"}
    async with pages.watch("a") as events:
        first = [json.loads(await next_event(events, "fragment")) for _ in range(2)]
        assert {fragment["id"] for fragment in first} == {"still", "moving"}
        for value in ("2", "3"):
            pages.source.shown = {"still": "same", "moving": value}
            assert json.loads(await next_event(events, "fragment")) == {"id": "moving", "html": value}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DatabaseUnavailable("postgres at db.internal refuses"), NOT_CURRENT),
        (OrderNotFound("there is no such order"), "there is no such order"),
        (RuntimeError("a bug"), "something went wrong on our side: what you see is not current"),
    ],
)
async def test_a_page_that_cannot_be_read_says_so(pages: Pages, error: Exception, told: str) -> None:
    """The stream goes on; when the page can be read again, the problem is over. No address of a server is told."""
    async with pages.watch("a") as events:
        await next_event(events, "fragment")
        pages.source.error = error
        assert await next_event(events, "problem") == told
        pages.source.error = None
        assert await next_event(events, "problem") == ""


async def test_streams_are_bounded() -> None:
    """At capacity, more are refused: of a tenant with 429, of the process with 503. A stream that ends makes room."""
    async with serving_pages(capacity=2, tenant_capacity=1) as pages:
        async with pages.watch("a", tenant="acme") as events:
            await next_event(events, "hello")
            assert await pages.status("a", tenant="acme") == 429
            async with pages.watch("a") as others:
                await next_event(others, "hello")
                assert await pages.status("a", tenant="globex") == 503
        await wait_until(lambda: pages.feed.count == 0, AMPLE_SECONDS, "end of both streams")
        assert await pages.status("a", tenant="acme") == 200


async def test_a_stream_ends_with_its_session() -> None:
    """The last event says so. A silent page does not delay it."""
    async with serving_pages(heartbeat_seconds=AMPLE_SECONDS) as pages, pages.watch("a", seconds="0.1") as events:
        received = [event async for event, _ in events]
    assert received == ["hello", "fragment", "expired"]


async def test_a_long_stream_is_opened_anew() -> None:
    """It ends without a word after its time, and the browser opens another one, which checks the session again."""
    async with serving_pages(stream_seconds=0.1) as pages, pages.watch("a", seconds="3600") as events:
        assert [event async for event, _ in events] == ["hello", "fragment"]


async def test_streams_end_when_the_process_stops(pages: Pages) -> None:
    """They end at once, and no more are accepted."""
    async with pages.watch("a") as events:
        await next_event(events, "fragment")
        pages.feed.stop()
        async with asyncio.timeout(AMPLE_SECONDS):
            assert [event async for event, _ in events] == []
    assert await pages.status("a") == 503


async def test_a_client_that_reads_nothing_leaves_nothing_behind(pages: Pages) -> None:
    """When it is gone, its stream is, though the server was still sending."""
    pages.source.shown = {"title": "x" * MANY_BYTES}
    url = pages.http.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    await wait_until(lambda: pages.source.readings.get("a", 0) >= 2, AMPLE_SECONDS, "readings for a client")
    assert pages.feed.count == 1
    writer.transport.abort()
    await wait_until(lambda: pages.feed.count == 0, AMPLE_SECONDS, "end of the stream")


async def test_head_does_not_stream(pages: Pages) -> None:
    """HEAD answers at once, and opens no stream."""
    answer = await pages.http.head("/a")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert pages.feed.count == 0

"""`GET /orders/{id}/timeline` and `/events`: the story of an order over HTTP, at once and live."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID, uuid4

import httpx
import pytest
from structlog.testing import capture_logs

from app.api.orders.streams import Streams
from app.db import Pool
from app.errors import Overloaded, TooManyRequests
from app.operations.timeline import Position
from tests.harness.api import assert_problem, serving
from tests.harness.orders import TENANT, placed, start_saga
from tests.harness.queues import CONSUMER
from tests.harness.sagas import Stage
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until


@dataclass(frozen=True)
class Received:
    """One server-sent event."""

    id: str
    event: str
    data: dict[str, object]


async def events_of(response: httpx.Response) -> AsyncIterator[Received]:
    """Parse a stream; comments are skipped."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif "data" in fields:
            yield Received(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


async def read_all(api: httpx.AsyncClient, order_id: UUID, last: str = "") -> list[Received]:
    """Read a stream to its end."""
    headers = {"Last-Event-ID": last} if last else {}
    async with api.stream("GET", f"/orders/{order_id}/events", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-accel-buffering"] == "no"
        return [received async for received in events_of(response)]


async def test_the_timeline_is_served(api: httpx.AsyncClient, stage: Stage) -> None:
    """The story, the status, and nothing that is stuck; it is not cached."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    response = await api.get(f"/orders/{saga}/timeline")
    body = response.raise_for_status().json()
    assert (body["order_id"], body["status"], body["why_stuck"]) == (str(saga), "confirmed", None)
    assert set(body["entries"][0]) >= {
        "id",
        "at",
        "source",
        "event",
        "step",
        "attempt",
        "outcome",
        "detail",
        "trace_id",
    }
    assert response.headers["cache-control"] == "no-store"


async def test_a_stream_ends_with_the_final_status(api: httpx.AsyncClient, stage: Stage) -> None:
    """It sends what has happened, then what happens; resumed at its end, it is a 204."""
    saga = await start_saga(stage.pool)
    reading = asyncio.create_task(read_all(api, saga))
    await stage.drive()
    received = await asyncio.wait_for(reading, AMPLE_SECONDS)
    assert received[0].data["event"] == "order-placed"
    assert received[-1].data["event"] == "order-confirmed"
    assert len({each.id for each in received}) == len(received)
    over = await api.get(f"/orders/{saga}/events", headers={"Last-Event-ID": received[-1].id})
    assert (over.status_code, over.content) == (204, b"")


async def test_a_resumed_stream_has_no_gap(api: httpx.AsyncClient, stage: Stage) -> None:
    """From any event on, the rest follows."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    whole = [each.data["id"] for each in await read_all(api, saga)]
    for number, last in enumerate(await read_all(api, saga)):
        if number < len(whole) - 1:
            assert [each.data["id"] for each in await read_all(api, saga, last.id)] == whole[number + 1 :]


async def test_head_does_not_stream(api: httpx.AsyncClient, pool: Pool) -> None:
    """HEAD answers at once, though the order has not ended, and promises no length."""
    response = await api.head(f"/orders/{(await placed(pool)).id}/events")
    assert (response.status_code, response.content) == (200, b"")
    assert "content-length" not in response.headers


async def test_bad_requests_are_refused(api: httpx.AsyncClient, pool: Pool) -> None:
    """An unknown order is a 404, a position that no stream sent a 400."""
    for path in ("timeline", "events"):
        assert_problem(await api.get(f"/orders/{uuid4()}/{path}"), 404, "order-not-found")
        assert_problem(await api.get(f"/orders/{(await placed(pool, tenant='b')).id}/{path}"), 404, "order-not-found")
    order = await placed(pool)
    response = await api.get(f"/orders/{order.id}/events", headers={"Last-Event-ID": "1.?"})
    assert_problem(response, 400, "malformed-request")


async def test_a_stream_is_no_sample_of_the_latency(api: httpx.AsyncClient, stage: Stage) -> None:
    """The histogram of durations has no stream in it."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    await read_all(api, saga)
    assert 'route="/orders/{order_id}/events"' not in (await api.get("/metrics")).text


async def test_streams_are_bounded(pool: Pool) -> None:
    """At capacity, more are refused: of a tenant with 429, of the process with 503. A stream that ends makes room."""
    order = await placed(pool)
    streams = Streams(pool, CONSUMER, capacity=2, tenant_capacity=1)
    entries = await streams.read(order.id, TENANT)
    async with contextlib.aclosing(streams.follow(order.id, TENANT, Position(), entries)) as first:
        assert b"order-placed" in await anext(first)
        with pytest.raises(TooManyRequests):
            streams.require_room(TENANT)
        streams.require_room("other")
        async with contextlib.aclosing(streams.follow(order.id, "other", Position(), entries)) as second:
            await anext(second)
            with pytest.raises(Overloaded):
                streams.require_room("third")
    streams.require_room(TENANT)
    assert streams.count == 0
    await streams.close()


async def test_a_silent_stream_has_heartbeats(pool: Pool) -> None:
    """A comment keeps proxies from closing it; when streams stop, the last event says when to reconnect."""
    order = await placed(pool)
    streams = Streams(pool, CONSUMER, heartbeat_seconds=0.01)
    entries = await streams.read(order.id, TENANT)
    chunks: list[bytes] = []

    async def follow() -> None:
        async for chunk in streams.follow(order.id, TENANT, Position(), entries):
            chunks.append(chunk)  # noqa: PERF401 - the test looks while it grows

    following = asyncio.create_task(follow())
    await wait_until(lambda: b": ping\n\n" in chunks, AMPLE_SECONDS, "a heartbeat")
    streams.stop()
    await asyncio.wait_for(following, AMPLE_SECONDS)
    assert chunks[-1] == b"retry: 1000\n\n"
    with pytest.raises(Overloaded):
        streams.require_room(TENANT)
    await streams.close()


async def test_streams_outlive_a_failed_read(pool: Pool, stage: Stage) -> None:
    """An error that is no outage is logged, and the streams of the order go on."""
    saga = await start_saga(stage.pool)
    streams = Streams(pool, CONSUMER)
    entries = await streams.read(saga, TENANT)

    async def follow() -> bytes:
        return [chunk async for chunk in streams.follow(saga, TENANT, Position(), entries)][-1]

    with capture_logs() as logs:
        following = asyncio.create_task(follow())
        await pool.execute("ALTER TABLE operator_actions RENAME TO missing")
        await wait_until(lambda: any(line["event"] == "streams.failed" for line in logs), AMPLE_SECONDS, "the error")
        await pool.execute("ALTER TABLE missing RENAME TO operator_actions")
    await stage.drive()
    assert b"order-confirmed" in await asyncio.wait_for(following, AMPLE_SECONDS)
    await streams.close()


async def test_a_process_that_stops_ends_its_streams(database_url: str, pool: Pool) -> None:
    """The server does not wait for the order to end: it tells the client to reconnect, and stops."""
    order = await placed(pool)
    lines: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(serving(database_url))

        async def read() -> None:
            async with (
                plain_http(str(api.base_url)) as client,  # it outlives the server
                client.stream("GET", f"/orders/{order.id}/events") as response,
            ):
                lines.extend([line async for line in response.aiter_lines() if line])

        reading = asyncio.create_task(read())
        await wait_until(lambda: in_progress(api), AMPLE_SECONDS, "an open stream")
        await stack.aclose()
        await asyncio.wait_for(reading, AMPLE_SECONDS)
    assert lines[0] == "event: request"
    assert lines[-1] == "retry: 1000"


async def in_progress(api: httpx.AsyncClient) -> bool:
    """Return whether a stream is open."""
    return "event_streams_open 1.0" in (await api.get("/metrics")).text

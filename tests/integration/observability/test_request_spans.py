"""Requests and their traces: one server span, or none; what fails is traced; a collector never blocks the service."""

import re

import httpx
import pytest

from app.db import Pool
from app.observability.tracing import SPANS_DROPPED
from tests.harness.api import serving
from tests.harness.otlp import Sink
from tests.harness.wait import AMPLE_SECONDS, wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
ORDER = {"sku": "WIDGET", "quantity": 1, "unit_price": 1}


async def place(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    answer = await client.post("/orders", json=ORDER, headers=headers)
    assert answer.status_code == 201
    return answer


async def test_a_sampled_request_has_one_server_span(database_url: str, sink: Sink) -> None:
    """Its names are the stable ones; ASGI messages and FastAPI's own telemetry add no spans."""
    async with serving(database_url, tracing=sink.tracing()) as client:
        await place(client, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00", tracestate="a=1")
        await client.get("/livez")
        await client.get("/metrics")
    (server,) = [span for span in sink.spans if span.kind == "SERVER"]
    assert (server.name, server.trace_id, server.parent_id) == ("POST /orders", TRACE_ID, PARENT_ID)
    assert server.attributes["http.request.method"] == "POST"
    assert server.attributes["http.route"] == "/orders"
    assert server.attributes["http.response.status_code"] == 201
    assert server.service == "orders"
    assert {span.trace_id for span in sink.spans} == {TRACE_ID}


async def test_a_span_shows_no_path_and_no_query(database_url: str, sink: Sink) -> None:
    """A path may contain an idempotency key."""
    async with serving(database_url, tracing=sink.tracing()) as client:
        await client.get("/idempotency-keys/secret-key?secret=1")
        await client.get("/secret-path")
    assert {span.attributes["url.path"] for span in sink.spans} == {"/idempotency-keys/{key:path}", "unmatched"}
    assert not [span for span in sink.spans if "secret" in str(span)]


@pytest.mark.parametrize(("sampler", "obeys_callers", "spans"), [
    ("always_off", False, 0), ("parentbased_always_off", False, 0), ("parentbased_always_off", True, 1),
    ("always_on", False, 1),
])  # fmt: skip
async def test_the_sampler_decides(
    database_url: str, sink: Sink, pool: Pool, sampler: str, obeys_callers: bool, spans: int
) -> None:
    """A caller's flag counts only with the setting. What is not sampled carries its trace id and says so."""
    tracing = sink.tracing(traces_sampler=sampler, obeys_callers=obeys_callers)
    async with serving(database_url, tracing=tracing) as client:
        await place(client, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    assert len([span for span in sink.spans if span.kind == "SERVER"]) == spans
    stored = await pool.fetchval("SELECT traceparent FROM outbox")
    assert re.fullmatch(f"00-{TRACE_ID}-[0-9a-f]{{16}}-0[01]", stored)
    assert int(stored[-2:]) == spans
    assert PARENT_ID not in stored


async def test_an_unsampled_5xx_has_one_span(database_url: str, sink: Sink) -> None:
    """It is an error, and the caller's span is its parent."""
    tracing = sink.tracing(traces_sampler="always_off")
    async with serving(database_url, tracing=tracing, http_max_in_flight=1, outbox_max_pending=1) as client:
        await place(client)
        await wait_until(lambda: is_refused(client), AMPLE_SECONDS, "a full outbox")
    assert sink.spans
    assert {(span.name, span.kind, span.failed, span.parent_id) for span in sink.spans} == {
        ("POST /orders", "SERVER", True, PARENT_ID)
    }
    assert sink.spans[0].attributes["http.response.status_code"] == 503


async def is_refused(client: httpx.AsyncClient) -> bool:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    return (await client.post("/orders", json=ORDER, headers=headers)).status_code == 503


async def test_a_stalled_collector_blocks_no_request(database_url: str, sink: Sink) -> None:
    """Spans beyond the queue are dropped and counted; the end of the service does not wait longer than its share."""
    sink.gate.clear()
    before = SPANS_DROPPED._value.get()  # noqa: SLF001 - a registry that shows it may not exist yet
    async with serving(
        database_url,
        tracing=sink.tracing(bsp_max_queue_size=2, bsp_max_export_batch_size=1),
        shutdown_timeout_seconds=1,
    ) as client:
        for _ in range(8):
            await place(client)
        assert "trace_spans_dropped_total" in (await client.get("/metrics")).text
    assert SPANS_DROPPED._value.get() > before  # noqa: SLF001 - as above


async def test_a_failing_collector_counts_as_drops(database_url: str, sink: Sink) -> None:
    """No request notices."""
    sink.status = 400  # final: the exporter does not retry
    before = SPANS_DROPPED._value.get()  # noqa: SLF001 - as above
    async with serving(database_url, tracing=sink.tracing()) as client:
        await place(client)
        await wait_until(lambda: SPANS_DROPPED._value.get() > before, AMPLE_SECONDS, "a dropped span")  # noqa: SLF001

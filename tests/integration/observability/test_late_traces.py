"""What goes wrong is traced, even if its request was not sampled: once, from the rows, with the stored trace id."""

from typing import Any

import httpx

from app.db import Pool
from tests.harness.api import serving
from tests.harness.otlp import SeenSpan, Sink
from tests.harness.sandboxes import set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00"}
PROCESS = "process orders.events:order.placed:orders.saga"
INTAKE = ["publish orders.events:order.placed", "outbox wait", "order transaction", "POST /orders"]


ADMIN_TOKEN = "admin-token-of-the-tests"


async def place(client: httpx.AsyncClient, sku: str = "WIDGET", **more: Any) -> str:
    body = {"sku": sku, "quantity": 1, "unit_price": 1, **more}
    answer = await client.post("/orders", json=body, headers=CALLER)
    assert answer.status_code == 201
    return str(answer.json()["id"])


async def end(client: httpx.AsyncClient, order: str) -> str:
    """Wait for the end of the order, and return its status."""

    async def ended() -> str | None:
        status = str((await client.get(f"/orders/{order}")).json()["status"])
        return status if status in {"confirmed", "rejected", "cancelled"} else None

    return await wait_until(ended, AMPLE_SECONDS, "end of the order") or ""


def path_to_root(spans: list[SeenSpan], span: SeenSpan) -> list[str]:
    """Return the names from a span to the root of its trace."""
    by_id = {other.span_id: other for other in spans}
    names = [span.name]
    while span.parent_id:
        span = by_id[span.parent_id]
        names.append(span.name)
    return names


async def test_an_unsampled_compensated_order_is_one_tree(
    system: dict[str, Any], sink: Sink, http: httpx.AsyncClient, pool: Pool
) -> None:
    """Its tree has every hop, with the instants of the rows, and is written once."""
    await set_faults(http, {"target": "payment.charge", "kind": "refuse"})
    async with serving(**system, tracing=sink.tracing(traces_sampler="always_off")) as client:
        order = await place(client)
        assert await end(client, order) == "rejected"
        await sink.until("publish orders.events:order.rejected")
        await sink.until("saga")
    spans = sink.of(TRACE_ID)
    assert spans == sorted(sink.spans, key=lambda span: span.started_at)
    assert len({span.span_id for span in spans}) == len(spans)
    assert [span.name for span in spans if not span.parent_id] == ["POST /orders"]
    by_name = {span.name: span for span in spans}
    for step in ("reserve_inventory do", "charge_payment do", "reserve_inventory undo"):
        (call,) = [span for span in spans if span.parent_id == by_name[step].span_id]
        assert path_to_root(spans, call) == ["POST", step, "saga", PROCESS, *INTAKE]
        assert call.ended_at >= call.started_at > by_name["POST /orders"].started_at
    final = by_name["publish orders.events:order.rejected"]
    assert path_to_root(spans, final) == [final.name, "outbox wait", "saga", PROCESS, *INTAKE]
    assert {span.name for span in spans if span.failed} >= {"saga", "charge_payment do"}
    assert {span.attributes["orders.order_id"] for span in spans} == {order}
    stored = await pool.fetchrow("SELECT started_at, finished_at FROM sagas WHERE traced_at IS NOT NULL")
    assert stored is not None
    assert by_name["saga"].started_at == int(stored["started_at"].timestamp() * 1_000_000) * 1000
    assert by_name["saga"].ended_at == int(stored["finished_at"].timestamp() * 1_000_000) * 1000


async def test_an_unsampled_good_order_has_no_span(system: dict[str, Any], sink: Sink, pool: Pool) -> None:
    async with serving(**system, tracing=sink.tracing(traces_sampler="always_off")) as client:
        assert await end(client, await place(client)) == "confirmed"
    assert sink.names() == []
    assert await pool.fetchval("SELECT traced_at FROM sagas") is None


async def test_a_sampled_order_has_no_late_trace(
    system: dict[str, Any], sink: Sink, http: httpx.AsyncClient, pool: Pool
) -> None:
    """Its spans were exported as they ended."""
    await set_faults(http, {"target": "payment.charge", "kind": "refuse"})
    async with serving(**system, tracing=sink.tracing()) as client:
        assert await end(client, await place(client)) == "rejected"
        await sink.until("publish orders.events:order.rejected")
    assert not [span for span in sink.spans if "orders.written_late" in span.attributes]
    assert len(sink.names(TRACE_ID)) == len({span.span_id for span in sink.of(TRACE_ID)})
    assert await pool.fetchval("SELECT traced_at FROM sagas") is None


async def test_what_follows_a_late_trace_joins_it(system: dict[str, Any], sink: Sink, http: httpx.AsyncClient) -> None:
    """A saga that needs an operator is traced then; its later calls are traced as they end, in the same trace."""
    await set_faults(
        http, {"target": "shipping.create", "kind": "refuse"}, {"target": "payment.refund", "kind": "error"}
    )
    quick: dict[str, Any] = {
        "partner_retry_cap_seconds": 0.1,
        "partner_circuit_open_seconds": 0.1,
        "saga_needs_operator_seconds": 0.1,
    }
    async with serving(**system, tracing=sink.tracing(traces_sampler="always_off"), **quick) as client:
        order = await place(client)
        await sink.until("saga")
        await http.delete("/faults")
        assert await end(client, order) == "rejected"
        await sink.until("publish orders.events:order.rejected")
        await sink.until("reserve_inventory undo")
    spans = sink.of(TRACE_ID)
    assert spans == sorted(sink.spans, key=lambda span: span.started_at)
    followed = {span.name for span in spans if "orders.written_late" not in span.attributes}
    assert {"charge_payment undo", "reserve_inventory undo"} <= followed
    assert len({span.span_id for span in spans}) == len(spans)
    assert [span.name for span in spans if not span.parent_id] == ["POST /orders"]


async def test_an_unsampled_dead_letter_is_traced(system: dict[str, Any], sink: Sink, pool: Pool) -> None:
    """The span of its processing has the error, below the spans of its request and publication."""
    await pool.execute("ALTER TABLE sagas RENAME COLUMN hold_seconds TO hidden")
    tracing = sink.tracing(traces_sampler="always_off")
    async with serving(**system, tracing=tracing, inbox_max_attempts=1) as client:
        await place(client)
        (process,) = await sink.until(PROCESS)
    assert process.failed
    assert path_to_root(sink.of(TRACE_ID), process) == [PROCESS, *INTAKE]
    assert len(sink.spans) == len(INTAKE) + 1


async def test_what_an_operator_does_is_linked(system: dict[str, Any], sink: Sink, pool: Pool) -> None:
    """A replay of a dead letter links to the operator's request, a request about a saga to the order's trace."""
    await pool.execute("ALTER TABLE sagas RENAME COLUMN hold_seconds TO hidden")
    settings: dict[str, Any] = {**system, "inbox_max_attempts": 1, "admin_token": ADMIN_TOKEN}
    authorized = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with serving(**settings, tracing=sink.tracing()) as client:
        order = await place(client)
        (failed,) = await sink.until(PROCESS)
        await pool.execute("ALTER TABLE sagas RENAME COLUMN hidden TO hold_seconds")

        async def is_replayed() -> bool:
            answer = await client.post("/ops/dlq/replay", json={"reason": "repaired"}, headers=authorized)
            return bool(answer.json()["done"]) if answer.status_code == 200 else False

        await wait_until(is_replayed, AMPLE_SECONDS, "the dead letter")
        assert await end(client, order) == "confirmed"
        await client.post(f"/ops/sagas/{order}/retry", json={"reason": "too late"}, headers=authorized)
        (operated,) = await sink.until("POST /ops/sagas/{order_id}/retry")
        _, replayed = await sink.until(PROCESS, 2)
        requests = await sink.until("POST /ops/dlq/replay")
    assert replayed.attributes["orders.replayed"] is True
    assert (failed.attributes["orders.replayed"], failed.links) == (False, [])
    assert replayed.links[0] in {request.span_id for request in requests}
    assert operated.links == [replayed.span_id]

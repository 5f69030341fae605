"""One order is one trace, through outbox, broker, saga and partners."""

from typing import Any

import httpx

from tests.harness.api import serving
from tests.harness.otlp import SeenSpan, Sink
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDER = {"sku": "WIDGET", "quantity": 1, "unit_price": 1}
STEPS = ["reserve_inventory do", "charge_payment do", "commit_inventory do", "create_shipment do"]


async def finish(client: httpx.AsyncClient) -> dict[str, Any]:
    """Place an order, wait for its end, and return it."""
    answer = await client.post("/orders", json=ORDER)
    assert answer.status_code == 201

    async def ended() -> dict[str, Any] | None:
        order: dict[str, Any] = (await client.get(answer.headers["location"])).json()
        return order if order["status"] in {"confirmed", "rejected", "cancelled"} else None

    return await wait_until(ended, AMPLE_SECONDS, "end of the order") or {}


def path_to_root(spans: list[SeenSpan], span: SeenSpan) -> list[str]:
    """Return the names from a span to the root of its trace."""
    by_id = {other.span_id: other for other in spans}
    names = [span.name]
    while span.parent_id:
        span = by_id[span.parent_id]
        names.append(span.name)
    return names


PROCESS = "process orders.events:order.placed:orders.saga"
INTAKE = ["publish orders.events:order.placed", "outbox wait", "order transaction", "POST /orders"]


async def test_one_order_is_one_tree(system: dict[str, Any], sink: Sink) -> None:
    """Every hop is there, below the one before it; each span says which order it is about."""
    async with serving(**system, tracing=sink.tracing()) as client:
        order = await finish(client)
        await sink.until("publish orders.events:order.confirmed")
        await sink.until("saga")
        (server,) = await sink.until("POST /orders")
    spans = sink.of(server.trace_id)
    assert len({span.span_id for span in spans}) == len(spans)
    assert [span.name for span in spans if not span.parent_id] == ["POST /orders"]
    by_name = {span.name: span for span in spans}
    for step in STEPS:
        (call,) = [span for span in spans if span.parent_id == by_name[step].span_id]
        assert path_to_root(spans, call) == ["POST", step, "saga", PROCESS, *INTAKE]
        assert (call.kind, call.attributes["http.request.method"]) == ("CLIENT", "POST")
    end = ["publish orders.events:order.confirmed", "outbox wait", "saga"]
    assert path_to_root(spans, by_name[end[0]]) == [*end, PROCESS, *INTAKE]
    assert by_name[PROCESS].kind == "CONSUMER"
    assert by_name[INTAKE[0]].kind == "PRODUCER"
    about = [span for span in spans if span.attributes.get("orders.order_id") == order["id"]]
    assert {"POST /orders", PROCESS, "saga", "outbox wait", *STEPS} <= {span.name for span in about}
    assert not any(span.failed for span in spans)
    assert all(span.started_at <= span.ended_at for span in spans)

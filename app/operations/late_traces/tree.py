"""Make the spans of an order from its rows: the tree that a sampled order has, as far as rows know it. Pure.

The root has the span id that the request had in its log lines and its event. Ids of other spans derive from row ids.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from http import HTTPStatus

from opentelemetry.trace import SpanKind

from app.messaging.spans import publish_span_id
from app.messaging.topology import EXCHANGE, routing_key
from app.observability.stored_spans import StoredSpan
from app.observability.traces import derive_span_id
from app.operations.late_traces.rows import OrderRows, Row
from app.saga.steps import PLANS, Plans, specs
from app.saga.store import late_span_id

Attributes = Mapping[str, str | int | bool | None]


def make_spans(rows: OrderRows, root_id: int, queue: str, plans: Plans = PLANS) -> list[StoredSpan]:
    """Return the spans of the rows that were claimed. `root_id`: of the request. `queue`: of the saga's consumer."""
    about: Attributes = {"orders.order_id": str(rows.order["id"]), "orders.tenant": rows.order["tenant"]}
    spans: list[StoredSpan] = []
    if rows.event is not None:
        spans += _intake(rows.order, rows.event, root_id, about)
    if rows.inbox is not None or rows.saga is not None:
        spans += _process(rows, root_id, queue, about)
    if rows.saga is not None:
        spans += _saga(rows, rows.saga, about, {spec.step: spec.partner for spec in specs(plans)})
    return spans


def _intake(order: Row, event: Row, root_id: int, about: Attributes) -> Iterator[StoredSpan]:
    placed_at: datetime = order["placed_at"]
    stored_at = event["pending_since"] or event["occurred_at"]
    request: Attributes = {
        "http.request.method": "POST",
        "http.route": "/orders",
        "http.response.status_code": HTTPStatus.CREATED.value,
    }
    transaction_id = derive_span_id("transaction", order["id"])
    yield StoredSpan("POST /orders", SpanKind.SERVER, root_id, None, placed_at, stored_at, {**about, **request})
    yield StoredSpan("order transaction", SpanKind.INTERNAL, transaction_id, root_id, placed_at, stored_at, {**about})
    left_at = event["left_at"]
    if left_at is None:  # it still waits, or the relay holds it: the relay will trace its publication
        return
    key, wait_id = routing_key(event["type"]), derive_span_id("wait", event["id"])
    message = {**about, "orders.event_id": str(event["id"])}
    parked = event["last_error"] if event["parked_at"] is not None else None
    yield StoredSpan("outbox wait", SpanKind.INTERNAL, wait_id, transaction_id, event["occurred_at"], left_at, message)
    yield StoredSpan(
        f"publish {EXCHANGE}:{key}",
        SpanKind.PRODUCER,
        publish_span_id(event["id"], resends=0),
        wait_id,
        left_at,  # a row has the instant of the confirm alone
        left_at,
        {
            **message,
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "messaging.destination.name": f"{EXCHANGE}:{key}",
            "messaging.message.id": str(event["id"]),
            "orders.attempt": event["attempts"] + 1,
            "error.type": None if parked is None else "refused",
        },
        error=parked,
    )


def _process(rows: OrderRows, root_id: int, queue: str, about: Attributes) -> Iterator[StoredSpan]:
    order_id, inbox, saga = rows.order["id"], dict(rows.inbox or {}), dict(rows.saga or {})
    ended_at = inbox.get("processed_at") or inbox.get("dead_at") or saga.get("started_at")
    if ended_at is None:  # it fails and is retried: neither dead nor processed
        return
    is_dead = inbox.get("processed_at") is None and inbox.get("dead_at") is not None
    has_publish = rows.event is not None and rows.event["left_at"] is not None
    destination = f"{EXCHANGE}:order.placed:{queue}"
    yield StoredSpan(
        f"process {destination}",
        SpanKind.CONSUMER,
        derive_span_id("process", order_id, "dead" if is_dead else "done"),
        publish_span_id(order_id, resends=0) if has_publish or rows.event is None else root_id,
        inbox.get("first_failure_at") or saga.get("started_at") or ended_at,
        ended_at,
        {
            **about,
            "orders.event_id": str(order_id),
            "orders.attempt": inbox.get("attempts", 0) if is_dead else inbox.get("attempts", 0) + 1,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": destination,
            "messaging.message.id": str(order_id),
            "error.type": "dead" if is_dead else None,
        },
        error=inbox["last_error"] if is_dead else None,
    )


def _saga(rows: OrderRows, saga: Row, about: Attributes, partners: Mapping[str, str]) -> Iterator[StoredSpan]:
    saga_id = late_span_id(saga["id"])
    ended_at = saga["finished_at"] or saga["now"]
    if saga["direction"] == "backward":
        error = saga["reason"] or "compensating"
    else:
        error = "late" if ended_at > saga["deadline_at"] else None
    yield StoredSpan(
        "saga",
        SpanKind.INTERNAL,
        saga_id,
        derive_span_id("process", saga["id"], "done"),
        saga["started_at"],
        ended_at,
        {**about, "orders.direction": saga["direction"], "orders.status": rows.order["status"], "error.type": error},
        error=error,
    )
    for step in rows.steps:
        yield from _step(step, saga_id, about, partners.get(step["step"]))


def _step(step: Row, saga_id: int, about: Attributes, partner: str | None) -> Iterator[StoredSpan]:
    step_id = derive_span_id("step", step["id"])
    failed = None if step["outcome"] == "done" else step["detail"] or step["outcome"]
    attributes = {
        **about,
        "orders.step": step["step"],
        "orders.action": step["action"],
        "orders.attempt": step["attempt"],
        "orders.replayed": step["attempt"] > 1,
        "orders.partner": partner,
        "orders.outcome": step["outcome"],
        "error.type": None if failed is None else step["outcome"],
    }
    instants = step["started_at"], step["at"]
    name = f"{step['step']} {step['action']}"
    yield StoredSpan(name, SpanKind.INTERNAL, step_id, saga_id, *instants, attributes, failed)
    # The row does not have the address of the partner; every call to one is a POST.
    call = {**attributes, "http.request.method": "POST"}
    yield StoredSpan("POST", SpanKind.CLIENT, derive_span_id("call", step["id"]), step_id, *instants, call, failed)

"""An event survives its travel through headers and body; whatever is no event is named for what it lacks."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from app.messaging.envelope import Envelope, UnreadableMessage, parse

EVENT = Envelope(
    id=UUID("01912d2c-6a5e-7c3d-9f10-0242ac120002"),
    type="orders.order.placed.v1",
    subject="01912d2c-6a5e-7c3d-9f10-0242ac120001",
    sequence=3,
    tenant="acme",
    time=datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC),
    data={"total": "9.99", "customer_id": "Zoë ✓", "items": [{"sku": "WIDGET", "quantity": 3}], "metadata": None},
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    tracestate="vendor=1",
)


def test_what_was_sent_is_what_is_read() -> None:
    assert parse(EVENT.headers(), EVENT.body()) == EVENT


def test_headers_may_arrive_as_bytes() -> None:
    headers = {name: value.encode() for name, value in EVENT.headers().items()}
    assert parse(headers, EVENT.body()) == EVENT


def test_the_attributes_travel_as_cloudevents_headers_with_the_trace_context_beside_them() -> None:
    assert EVENT.headers() == {
        "cloudEvents_specversion": "1.0",
        "cloudEvents_id": "01912d2c-6a5e-7c3d-9f10-0242ac120002",
        "cloudEvents_source": "/orders",
        "cloudEvents_type": "orders.order.placed.v1",
        "cloudEvents_subject": "01912d2c-6a5e-7c3d-9f10-0242ac120001",
        "cloudEvents_time": "2026-03-01T12:30:15.250000Z",
        "cloudEvents_sequence": "3",
        "cloudEvents_tenant": "acme",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
    }


def test_an_event_outside_of_a_trace_carries_no_trace_headers() -> None:
    untraced = Envelope(EVENT.id, EVENT.type, EVENT.subject, 1, "acme", EVENT.time, {})
    assert {"traceparent", "tracestate"}.isdisjoint(untraced.headers())
    assert parse(untraced.headers(), untraced.body()) == untraced


def test_times_are_sent_in_utc_whatever_zone_they_were_told_in() -> None:
    elsewhere = EVENT.time.astimezone(timezone(timedelta(hours=5, minutes=30)))
    told = Envelope(EVENT.id, EVENT.type, EVENT.subject, 1, "acme", elsewhere, {})
    assert told.headers()["cloudEvents_time"] == "2026-03-01T12:30:15.250000Z"


def test_the_body_is_the_data_alone_as_json() -> None:
    assert json.loads(EVENT.body()) == EVENT.data


@pytest.mark.parametrize("word", ["placed", "confirmed", "rejected", "cancelled"])
def test_the_routing_key_is_the_type_without_its_prefix_and_version(word: str) -> None:
    event = Envelope(EVENT.id, f"orders.order.{word}.v1", EVENT.subject, 1, "acme", EVENT.time, {})
    assert event.routing_key == f"order.{word}"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_unreadable(body: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableMessage, match=complaint):
        parse(EVENT.headers(), body)


@pytest.mark.parametrize("name", ["id", "type", "subject", "sequence", "tenant", "time"])
@pytest.mark.parametrize("replacement", [None, ""])
def test_a_missing_attribute_makes_an_event_unreadable_and_is_named(name: str, replacement: str | None) -> None:
    headers: Mapping[str, Any] = {**EVENT.headers(), f"cloudEvents_{name}": replacement}
    with pytest.raises(UnreadableMessage, match=f"cloudEvents_{name} is missing"):
        parse(headers, EVENT.body())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "no-uuid"),
        ("sequence", "first"),
        ("sequence", "9" * 5000),
        ("time", "yesterday"),
        ("time", "2026-03-01T12:30:15"),  # RFC 3339 wants an offset; without one nobody knows when it was
        ("subject", b"\xff"),
    ],
)
def test_an_attribute_of_the_wrong_form_makes_an_event_unreadable(name: str, value: str | bytes) -> None:
    headers: Mapping[str, Any] = {**EVENT.headers(), f"cloudEvents_{name}": value}
    with pytest.raises(UnreadableMessage, match="attributes cannot be read"):
        parse(headers, EVENT.body())


def test_a_message_of_somebody_else_is_unreadable() -> None:
    with pytest.raises(UnreadableMessage):
        parse({}, b'{"hello": "world"}')

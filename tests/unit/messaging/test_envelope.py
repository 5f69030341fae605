"""Events survive the way through headers and body. Other messages are unreadable, and the error says why."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from app.messaging.envelope import Envelope, JsonText, UnreadableMessage, parse

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


def test_a_sent_event_is_parsed_unchanged() -> None:
    """A sent event is parsed unchanged."""
    assert parse(EVENT.headers(), EVENT.body()) == EVENT


def test_headers_may_arrive_as_bytes() -> None:
    """Header values may be bytes."""
    headers = {name: value.encode() for name, value in EVENT.headers().items()}
    assert parse(headers, EVENT.body()) == EVENT


def test_attributes_are_cloudevents_headers() -> None:
    """Attributes are `cloudEvents_` headers; the trace context has its own headers."""
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


def test_an_event_without_a_trace_has_no_trace_headers() -> None:
    """An event outside of a trace has no trace headers."""
    untraced = Envelope(EVENT.id, EVENT.type, EVENT.subject, 1, "acme", EVENT.time, {})
    assert {"traceparent", "tracestate"}.isdisjoint(untraced.headers())
    assert parse(untraced.headers(), untraced.body()) == untraced


def test_times_are_sent_in_utc() -> None:
    """Times in any zone are sent in UTC."""
    elsewhere = EVENT.time.astimezone(timezone(timedelta(hours=5, minutes=30)))
    told = Envelope(EVENT.id, EVENT.type, EVENT.subject, 1, "acme", elsewhere, {})
    assert told.headers()["cloudEvents_time"] == "2026-03-01T12:30:15.250000Z"


def test_the_body_is_the_data_as_json() -> None:
    """The body is only the data, as JSON."""
    assert json.loads(EVENT.body()) == EVENT.data


def test_stored_data_is_sent_as_it_is() -> None:
    """The text is not parsed on its way to a broker. A handler in this process reads the same values."""
    stored = JsonText('{"total": "9.99"}')
    event = replace(EVENT, data=stored)
    assert event.body() == b'{"total": "9.99"}'
    assert event == replace(EVENT, data={"total": "9.99"})
    assert replace(EVENT, data=JsonText("not parsed")).body() == b"not parsed"


@pytest.mark.parametrize("word", ["placed", "confirmed", "rejected", "cancelled"])
def test_the_routing_key_comes_from_the_type(word: str) -> None:
    """The routing key is the type without prefix and version."""
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
    """A body that is no JSON object is unreadable."""
    with pytest.raises(UnreadableMessage, match=complaint):
        parse(EVENT.headers(), body)


@pytest.mark.parametrize("name", ["id", "type", "subject", "sequence", "tenant", "time"])
@pytest.mark.parametrize("replacement", [None, ""])
def test_a_missing_attribute_is_named(name: str, replacement: str | None) -> None:
    """A missing attribute makes an event unreadable, and the error names it."""
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
        ("time", "2026-03-01T12:30:15"),  # RFC 3339 requires an offset; without one the time is ambiguous
        ("subject", b"\xff"),
    ],
)
def test_an_invalid_attribute_is_unreadable(name: str, value: str | bytes) -> None:
    """An attribute of the wrong form makes an event unreadable."""
    headers: Mapping[str, Any] = {**EVENT.headers(), f"cloudEvents_{name}": value}
    with pytest.raises(UnreadableMessage, match="attributes cannot be read"):
        parse(headers, EVENT.body())


def test_a_foreign_message_is_unreadable() -> None:
    """A message without our attributes is unreadable."""
    with pytest.raises(UnreadableMessage):
        parse({}, b'{"hello": "world"}')

"""A message with any properties arrives, and can be sent again."""

import struct
from datetime import UTC, datetime
from typing import Any

import pytest
from aio_pika.message import IncomingMessage
from aiormq.abc import DeliveredMessage
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from app.messaging.envelope import UNDECODABLE
from app.messaging.rabbitmq.messages import clone_message
from app.messaging.rabbitmq.undecodable import decodable_header, headers_within
from tests.harness.raw_amqp import header, long_string, properties, short_string, table

FRAME_BYTES = 128 * 1024
MICROSECONDS = struct.pack(">Q", 1_772_000_000_000_000)


def received(payload: bytes) -> IncomingMessage:
    """Return the message that aio-pika makes from a content header."""
    read = ContentHeader()
    read.unmarshal(decodable_header(payload))
    delivery = Basic.Deliver("tag", 1, False, "exchange", "key")  # noqa: FBT003 - pamqp's order
    return IncomingMessage(DeliveredMessage(delivery=delivery, header=read, body=b"", channel=None))  # type: ignore[arg-type]


def test_a_decodable_header_stays_unchanged() -> None:
    """A decodable header is returned unchanged."""
    given = Basic.Properties(headers={"a": "ü", "n": 1}, message_id="m", timestamp=datetime(2026, 1, 1, tzinfo=UTC))
    payload = ContentHeader(body_size=7, properties=given).marshal()
    assert decodable_header(payload) is payload


@pytest.mark.parametrize(
    ("raw", "kept", "named"),
    [
        ({"timestamp": MICROSECONDS}, {"timestamp": None}, "timestamp: year 5"),
        ({"timestamp": b"\xff" * 8}, {"timestamp": None}, "timestamp: "),
        ({"message_id": short_string(b"r\xe9f-1")}, {"message_id": "r?f-1"}, "message_id: 'utf-8' codec"),
        (
            {"headers": table((b"name", long_string(b"Ren\xe9")))},
            {"headers": {"name": "Ren�"}},
            "headers: name not UTF-8",
        ),
        ({"headers": table((b"n\xe9", b"V"))}, {"headers": {}}, "headers: 'utf-8' codec"),
        ({"headers": table((b"at", b"T" + MICROSECONDS))}, {"headers": {}}, "headers: year 5"),
        ({"headers": table((b"odd", b"?"))}, {"headers": {}}, "headers: Unknown type"),
        ({"delivery_mode": b"\x07"}, {"delivery_mode": 1}, "delivery_mode: 7"),
        ({"expiration": short_string(b"soon")}, {"expiration": None}, "expiration: could not"),
        ({"app_id": short_string(b"\xff" * 255)}, {"app_id": "?" * 255}, "app_id: 'utf-8' codec"),
    ],
)
def test_undecodable_properties_are_named(raw: dict[str, bytes], kept: dict[str, Any], named: str) -> None:
    """Undecodable properties are named, and the others kept."""
    message = received(header(properties({"message_type": short_string(b"kept"), **raw})))
    assert message.type == "kept"
    assert str(message.headers.pop(UNDECODABLE)).startswith(named)
    assert {name: getattr(message, name) for name in kept} == kept


FIELDS = {
    "shortstr": st.binary(max_size=255).map(short_string),
    "octet": st.binary(min_size=1, max_size=1),
    "timestamp": st.binary(min_size=8, max_size=8),
    "table": st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=20),
            st.binary(max_size=40) | st.binary(max_size=20).map(long_string),
        ),
        max_size=4,
    ).map(lambda entries: table(*entries)),
}


ANY = {name: FIELDS[Basic.Properties.amqp_type(name)] for name in Basic.Properties.attributes()}


@given(st.fixed_dictionaries({}, optional=ANY))
def test_a_message_with_any_bytes_arrives(raw: dict[str, bytes]) -> None:
    """It can also be sent again, so it can be dead-lettered."""
    message = received(header(properties(raw)))
    again = clone_message(message, message.headers, FRAME_BYTES, {"x-reason": "why"})
    assert again.properties.marshal()
    assert UNDECODABLE not in again.headers


def test_attributes_are_kept_before_other_headers() -> None:
    """However small the others are. Of the others, the largest are dropped."""
    attributes = {"cloudEvents_id": "i" * 100}
    many = {f"h{number}": None for number in range(9)}
    assert headers_within({**many, **attributes, "large": "l" * 200}, 230) == {**many, **attributes}
    assert headers_within({**many, **attributes}, 130) == attributes

"""Repair frames that the AMQP library cannot decode, so that their messages arrive without the undecodable properties.

Publishers choose a message's properties, and the broker does not check most of them. A frame that aiormq cannot decode
ends the connection and all deliveries in progress; the message stays in the queue, so the next connection ends the same
way. So each frame passes through here before aiormq reads it: an undecodable property is replaced or dropped, and the
header `x-undecodable` names it. Parsing such a message raises `UnreadableMessage`, so the consumer dead-letters it.

aio-pika fails on an invalid `delivery_mode` or `expiration`. RabbitMQ refuses most of these over AMQP 0.9.1, but not
all that arrive by other protocols or releases, so they are checked here too.

`encodable_headers` and `headers_within` are for the other direction: received headers that cannot be sent again as they
are, or that do not fit into a frame with those that are added.
"""

import asyncio
import struct
from collections.abc import Mapping
from typing import Any

from aio_pika.abc import DeliveryMode, HeadersType
from aio_pika.message import decode_expiration
from pamqp import constants, decode, encode
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from app.messaging.envelope import HEADER_PREFIX, UNDECODABLE, one_line

FRAME_HEAD = struct.Struct(">BHI")  # type, channel, size of the payload
CONTENT_HEAD = struct.Struct(">HHQH")  # class, weight, size of the body, flags: which properties follow
DELIVER = struct.pack(">I", Basic.Deliver.index)
TEXT, TABLE = "shortstr", "table"
SIZES = {"octet": 1, "timestamp": 8}


class FrameReader:
    """The part of a StreamReader that aiormq uses, with each frame made decodable."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._frame = b""  # the unread rest of the current frame

    def at_eof(self) -> bool:
        """Return whether nothing is left to read."""
        return not self._frame and self._reader.at_eof()

    async def readexactly(self, size: int) -> bytes:
        """Return the next bytes, never across the end of a frame. Raises IncompleteReadError, as StreamReader does."""
        if not self._frame:
            self._frame = await self._next_frame()
        piece, self._frame = self._frame[:size], self._frame[size:]
        return piece

    async def _next_frame(self) -> bytes:
        head = await self._reader.readexactly(FRAME_HEAD.size)
        if head.startswith(constants.AMQP):  # not a frame: a server of another version announces its version
            return head
        kind, channel, size = FRAME_HEAD.unpack(head)
        rest = await self._reader.readexactly(size + 1)
        if kind == constants.FRAME_HEADER:
            payload = decodable_header(rest[:-1])
        elif kind == constants.FRAME_METHOD and rest.startswith(DELIVER):
            payload = _decodable_delivery(rest[:-1])
        else:
            return head + rest
        return FRAME_HEAD.pack(kind, channel, len(payload)) + payload + rest[-1:]


def _decodable_delivery(payload: bytes) -> bytes:
    """Return the Basic.Deliver with exchange and routing key in ASCII: a manual binding may accept any bytes."""
    exchange = len(DELIVER) + 1 + payload[len(DELIVER)] + 9  # consumer tag, delivery tag, redelivered
    if payload[exchange:].isascii():
        return payload
    routing_key = exchange + 1 + payload[exchange]
    names = _ascii(payload[exchange + 1 : routing_key]), _ascii(payload[routing_key + 1 :])
    return payload[: exchange + 1] + names[0] + payload[routing_key : routing_key + 1] + names[1]


def decodable_header(payload: bytes) -> bytes:
    """Return a content header that aiormq can decode: normally the received one."""
    header = ContentHeader()
    try:
        header.unmarshal(payload)
        _check(header.properties)
        if not _problem(header.properties):
            return payload
    except Exception:  # noqa: BLE001, S110 - foreign bytes may raise anything; below they are decoded one by one
        pass
    header.properties = _salvage(payload)
    return header.marshal()


def _check(properties: Basic.Properties) -> None:
    """Raise ValueError for properties that pamqp decodes but aio-pika rejects."""
    if properties.delivery_mode:
        DeliveryMode(properties.delivery_mode)
    decode_expiration(properties.expiration)


def _problem(properties: Basic.Properties) -> str | None:
    """Name the headers that were sent as text but are not UTF-8."""
    bad = [name for name, value in (properties.headers or {}).items() if _has_bytes(value)]
    return f"headers: {', '.join(bad)} not UTF-8" if bad else None


def _has_bytes(value: Any) -> bool:
    """Return whether a value contains bytes: pamqp decodes a string that is not UTF-8 to bytes."""
    if isinstance(value, dict):
        return any(_has_bytes(item) for item in value.values())
    return any(_has_bytes(item) for item in value) if isinstance(value, list) else isinstance(value, bytes)


def _salvage(payload: bytes) -> Basic.Properties:
    """Decode the properties one by one, keep those that can be decoded, and name the others in `x-undecodable`."""
    properties, problems = Basic.Properties(), []
    flags = CONTENT_HEAD.unpack_from(payload)[-1]
    offset = CONTENT_HEAD.size
    for name in Basic.Properties.attributes():
        if not flags & Basic.Properties.flags[name]:
            continue
        kind = Basic.Properties.amqp_type(name)
        raw = payload[offset : offset + _size(kind, payload[offset : offset + 4])]
        offset += len(raw)
        decoded = Basic.Properties()  # this property alone
        try:
            setattr(decoded, name, decode.by_type(raw, kind)[1])
            _check(decoded)
            problem = _problem(decoded)
        except Exception as error:  # noqa: BLE001 - as above
            problem = f"{name}: {error}"
            setattr(decoded, name, _ascii(raw[1:]).decode() if kind == TEXT and name != "expiration" else None)
        if problem:
            problems.append(problem)
        setattr(properties, name, decoded[name])
    properties.headers = encodable_headers({**(properties.headers or {}), UNDECODABLE: one_line("; ".join(problems))})
    return properties


def _size(kind: str, start: bytes) -> int:
    """Return the size of a property in bytes, from its first four bytes."""
    if kind == TEXT:
        return 1 + start[0]
    return 4 + int.from_bytes(start) if kind == TABLE else SIZES[kind]


def _ascii(text: bytes) -> bytes:
    """Replace non-ASCII bytes one by one, so that the length stays the same."""
    return bytes(byte if byte < 0x80 else ord("?") for byte in text)  # noqa: PLR2004 - where ASCII ends


def encodable_headers(headers: Mapping[str, Any]) -> HeadersType:
    """Return headers that can be sent: a value that pamqp cannot encode becomes text."""
    return {name: _encodable(value) for name, value in headers.items()}


def _encodable(value: Any) -> Any:
    if isinstance(value, bytes):
        return one_line(value.decode(errors="replace"))
    try:
        encode.encode_table_value(value)
    except Exception:  # noqa: BLE001 - a number out of range, bytes in a list, nesting that is too deep
        return one_line(repr(value)) if not isinstance(value, dict | list) else "nested, and not encodable"
    return value


def headers_within(headers: HeadersType, room: int) -> HeadersType:
    """Return the headers that fit into `room` bytes: first the event's attributes, then the smallest others."""
    sizes = {name: len(encode.field_table({name: value})) for name, value in headers.items()}
    kept: HeadersType = {}
    for name in sorted(sizes, key=lambda name: (not name.startswith(HEADER_PREFIX), sizes[name])):
        if sizes[name] <= room:
            kept[name] = headers[name]
            room -= sizes[name]
    return kept

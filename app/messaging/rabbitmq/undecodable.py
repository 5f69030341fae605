"""Messages that the AMQP library cannot decode: they arrive all the same, without what cannot be decoded.

The properties of a message are its publisher's, and the broker does not look at most of them. aiormq decodes every
frame as it reads it, and a frame that it cannot decode ends the connection, with every message that was under way; the
message stays in the queue, so the next connection ends the same way. So each frame passes through here before aiormq
sees it: a property that cannot be decoded is replaced or dropped, and the header `x-undecodable` says so. Parsing such
a message raises `UnreadableMessage`, so the consumer sets it aside.

aio-pika fails on a `delivery_mode` or an `expiration` that is none. RabbitMQ refuses most of these when they are
published by AMQP 0.9.1, not all that come in by other protocols or releases, so they are checked here, too.

The other direction is `encodable` and `fitting`: headers that came in as valid AMQP, yet cannot be written again as
they are, or not beside those that are added.
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
        self._frame = b""  # what has not been handed over of the present frame

    def at_eof(self) -> bool:
        """Tell whether nothing is left to read."""
        return not self._frame and self._reader.at_eof()

    async def readexactly(self, size: int) -> bytes:
        """Return the next bytes, never across the end of a frame. Raises IncompleteReadError, as StreamReader does."""
        if not self._frame:
            self._frame = await self._next_frame()
        piece, self._frame = self._frame[:size], self._frame[size:]
        return piece

    async def _next_frame(self) -> bytes:
        head = await self._reader.readexactly(FRAME_HEAD.size)
        if head.startswith(constants.AMQP):  # no frame: a server that speaks another version says which
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
    """Return a Basic.Deliver whose exchange and routing key are ASCII: a binding by hand may let any bytes through."""
    exchange = len(DELIVER) + 1 + payload[len(DELIVER)] + 9  # consumer tag, delivery tag, redelivered
    if payload[exchange:].isascii():
        return payload
    routing_key = exchange + 1 + payload[exchange]
    names = _ascii(payload[exchange + 1 : routing_key]), _ascii(payload[routing_key + 1 :])
    return payload[: exchange + 1] + names[0] + payload[routing_key : routing_key + 1] + names[1]


def decodable_header(payload: bytes) -> bytes:
    """Return a content header that aiormq can decode: as a rule, the one that came."""
    header = ContentHeader()
    try:
        header.unmarshal(payload)
        _check(header.properties)
        if not _problem(header.properties):
            return payload
    except Exception:  # noqa: BLE001, S110 - whatever a decoder makes of foreign bytes; they are read one by one below
        pass
    header.properties = _salvage(payload)
    return header.marshal()


def _check(properties: Basic.Properties) -> None:
    """Raise ValueError for what pamqp decodes and aio-pika makes no message of."""
    if properties.delivery_mode:
        DeliveryMode(properties.delivery_mode)
    decode_expiration(properties.expiration)


def _problem(properties: Basic.Properties) -> str | None:
    """Name the headers that were sent as text and are none."""
    bad = [name for name, value in (properties.headers or {}).items() if _has_bytes(value)]
    return f"headers: {', '.join(bad)} not UTF-8" if bad else None


def _has_bytes(value: Any) -> bool:
    """Tell whether a value holds bytes, which is what pamqp makes of a string that is not UTF-8."""
    if isinstance(value, dict):
        return any(_has_bytes(each) for each in value.values())
    return any(_has_bytes(each) for each in value) if isinstance(value, list) else isinstance(value, bytes)


def _salvage(payload: bytes) -> Basic.Properties:
    """Decode the properties one by one, keep what can be kept, and name the others in `x-undecodable`."""
    properties, problems = Basic.Properties(), []
    flags = CONTENT_HEAD.unpack_from(payload)[-1]
    offset = CONTENT_HEAD.size
    for name in Basic.Properties.attributes():
        if not flags & Basic.Properties.flags[name]:
            continue
        kind = Basic.Properties.amqp_type(name)
        raw = payload[offset : offset + _size(kind, payload[offset : offset + 4])]
        offset += len(raw)
        one = Basic.Properties()
        try:
            setattr(one, name, decode.by_type(raw, kind)[1])
            _check(one)
            problem = _problem(one)
        except Exception as error:  # noqa: BLE001 - as above
            problem = f"{name}: {error}"
            setattr(one, name, _ascii(raw[1:]).decode() if kind == TEXT and name != "expiration" else None)
        if problem:
            problems.append(problem)
        setattr(properties, name, one[name])
    properties.headers = encodable({**(properties.headers or {}), UNDECODABLE: one_line("; ".join(problems))})
    return properties


def _size(kind: str, start: bytes) -> int:
    """Return how many bytes a property takes, from its first four."""
    if kind == TEXT:
        return 1 + start[0]
    return 4 + int.from_bytes(start) if kind == TABLE else SIZES[kind]


def _ascii(text: bytes) -> bytes:
    """Replace what is not ASCII, byte by byte: the length stays, and it may have no room to grow."""
    return bytes(byte if byte < 0x80 else ord("?") for byte in text)  # noqa: PLR2004 - where ASCII ends


def encodable(headers: Mapping[str, Any]) -> HeadersType:
    """Return headers that can be sent: a value that AMQP's library cannot write becomes text."""
    return {name: _encodable(value) for name, value in headers.items()}


def _encodable(value: Any) -> Any:
    if isinstance(value, bytes):
        return one_line(value.decode(errors="replace"))
    try:
        encode.encode_table_value(value)
    except Exception:  # noqa: BLE001 - a number out of range, bytes in a list, nesting that is too deep
        return one_line(repr(value)) if not isinstance(value, dict | list) else "nested, and not writable"
    return value


def fitting(headers: HeadersType, room: int) -> HeadersType:
    """Return the headers that fit into `room` bytes: an event's attributes first, then the small ones."""
    sizes = {name: len(encode.field_table({name: value})) for name, value in headers.items()}
    kept: HeadersType = {}
    for name in sorted(sizes, key=lambda name: (not name.startswith(HEADER_PREFIX), sizes[name])):
        if sizes[name] <= room:
            kept[name] = headers[name]
            room -= sizes[name]
    return kept

"""AMQP 0-9-1's frames: name confirms, deliveries, acknowledgements and cancellations, so that faults can choose them.

A message is a method, a header and its body frames; here they are one piece, which a fault loses, doubles or delays as
a whole. Frames of other channels may come between them, and are forwarded.

Both copies of a doubled delivery have the same delivery tag, and RabbitMQ closes a channel that acknowledges a tag
twice. A real broker never causes that, so the proxy drops the first of the two acknowledgements: the broker sees one
when both copies are handled. (This supports `basic.ack` without `multiple`, which aio-pika uses.)

As RabbitMQ does, the proxy notifies a blocked client when it publishes, if the client announced that it understands.
Source: the AMQP 0-9-1 specification, sections 2.3.5 and 4.2; RabbitMQ's "Blocked Connection Notifications".
"""

import struct
from collections.abc import Iterator

from chaos.proxy.frames import Piece, Watcher

CONFIRM = "amqp: basic.ack of the broker"
ACKNOWLEDGEMENT = "amqp: basic.ack of a consumer"
PUBLISHED = "amqp: basic.publish with its message"
DELIVERY = "amqp: basic.deliver with its message"
CANCELLATION = "amqp: basic.cancel of the broker"

HEADER = struct.Struct("!BHI")  # type, channel, bytes of the payload; a byte 0xCE follows the payload
END = 0xCE
METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT = 1, 2, 3, 8
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"  # the client's first bytes; a server sends it to ask for another protocol

METHOD_ID = struct.Struct("!HH")  # class and method, at the start of a method's payload
START_OK, BLOCKED, UNBLOCKED = (METHOD_ID.pack(10, method) for method in (11, 60, 61))
CANCEL, PUBLISH, DELIVER, ACK = (METHOD_ID.pack(60, method) for method in (30, 40, 60, 80))
TAG = struct.Struct("!Q")  # at the start of an ack's arguments
BODY_BYTES = struct.Struct("!4xQ")  # in a content header, after class and weight
CAN_BE_BLOCKED = b"\x12connection.blockedt\x01"  # in a table: a name of 18 bytes, a boolean, true


def requests() -> Watcher:
    """Return a watcher for the stream from one client."""
    return _Requests()


def answers() -> Watcher:
    """Return a watcher for the stream from the server on one connection."""
    return _Frames({DELIVER: DELIVERY}, {ACK: CONFIRM, CANCEL: CANCELLATION})


class _Message:
    """The frames of one message, as they arrive."""

    def __init__(self, name: str, method: bytes) -> None:
        self.name = name
        self.data = method
        self._missing: int | None = None  # bytes of the body; None: the header is missing

    def add(self, kind: int, frame: bytes) -> bool:
        """Add the next frame. Return whether the message is complete."""
        self.data += frame
        if kind == CONTENT_HEADER:
            (self._missing,) = BODY_BYTES.unpack_from(frame, HEADER.size)
        elif self._missing is not None:
            self._missing -= len(frame) - HEADER.size - 1
        return self._missing == 0


class _Frames(Watcher):
    """Cuts a stream into whole frames, and joins those of the `messages`. Both arguments map methods to names."""

    def __init__(self, messages: dict[bytes, str], methods: dict[bytes, str]) -> None:
        self._messages = messages
        self._methods = methods
        self._held = b""  # the start of an incomplete frame
        self._incomplete: dict[int, _Message] = {}  # by channel

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        data = self._held + chunk if self._held else chunk
        start = 0
        while end := _end_of_frame(data, start):
            yield from self._pieces(data[start:end])
            start = end
        self._held = data[start:]

    def _pieces(self, frame: bytes) -> Iterator[Piece]:
        kind, channel, _ = HEADER.unpack_from(frame)
        method = frame[HEADER.size : HEADER.size + METHOD_ID.size] if kind == METHOD else b""
        if method in self._messages:
            self._incomplete[channel] = _Message(self._messages[method], frame)
        elif kind in {CONTENT_HEADER, CONTENT_BODY} and channel in self._incomplete:
            message = self._incomplete[channel]
            if message.add(kind, frame):
                del self._incomplete[channel]
                yield self._named(message.name, channel, message.data)
        elif method in self._methods:
            yield self._named(self._methods[method], channel, frame)
        else:
            self._unnamed(method, frame)
            yield Piece(frame)

    def _named(self, name: str, _channel: int, data: bytes) -> Piece:
        return Piece(data, name)

    def _unnamed(self, method: bytes, frame: bytes) -> None:
        """Inspect a frame that faults cannot choose."""


class _Requests(_Frames):
    """The stream from a client."""

    def __init__(self) -> None:
        super().__init__({PUBLISH: PUBLISHED}, {ACK: ACKNOWLEDGEMENT})
        self._can_be_blocked = False
        self._doubled: set[tuple[int, int]] = set()  # channel and tag of doubled deliveries

    def doubled(self, piece: Piece) -> None:
        if piece.frame == DELIVERY:
            _, channel, _ = HEADER.unpack_from(piece.data)
            after_consumer_tag = HEADER.size + METHOD_ID.size + 1 + piece.data[HEADER.size + METHOD_ID.size]
            self._doubled.add((channel, TAG.unpack_from(piece.data, after_consumer_tag)[0]))

    def _named(self, name: str, channel: int, data: bytes) -> Piece:
        if name == PUBLISHED and self._can_be_blocked:
            return Piece(data, name, blocked=_frame(BLOCKED, b"\x05chaos"), unblocked=_frame(UNBLOCKED))
        if name == ACKNOWLEDGEMENT:
            delivery = (channel, TAG.unpack_from(data, HEADER.size + METHOD_ID.size)[0])
            if delivery in self._doubled:
                self._doubled.remove(delivery)
                return Piece(b"")
        return Piece(data, name)

    def _unnamed(self, method: bytes, frame: bytes) -> None:
        if method == START_OK:
            self._can_be_blocked = CAN_BE_BLOCKED in frame


def _end_of_frame(data: bytes, start: int) -> int:
    """Return the end of the frame that begins at `start`; 0 when it is incomplete."""
    if data.startswith(PROTOCOL_HEADER[:4], start):
        end = start + len(PROTOCOL_HEADER)
        return end if end <= len(data) else 0
    if len(data) - start < HEADER.size:
        return 0
    kind, _, size = HEADER.unpack_from(data, start)
    end = start + HEADER.size + int(size) + 1
    if kind not in {METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT} or (end <= len(data) and data[end - 1] != END):
        raise ValueError(f"not an AMQP frame: {data[start : start + HEADER.size]!r}")
    return end if end <= len(data) else 0


def _frame(method: bytes, arguments: bytes = b"") -> bytes:
    """Return a method frame of the connection itself, which is channel 0."""
    return HEADER.pack(METHOD, 0, len(method) + len(arguments)) + method + arguments + bytes([END])

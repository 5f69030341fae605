"""Make messages with properties that our libraries would not encode, as other publishers may send them."""

import struct
from collections.abc import Mapping

import aio_pika
from aio_pika.abc import AbstractChannel
from pamqp.commands import Basic


class RawProperties(Basic.Properties):
    """Properties that are sent as the given bytes."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(delivery_mode=2)
        self.raw = raw

    def marshal(self) -> bytes:
        """Return the bytes."""
        return self.raw


def properties(raw: Mapping[str, bytes]) -> bytes:
    """Return the properties of a content header: flags, then each encoded property in AMQP's order."""
    present = [name for name in Basic.Properties.attributes() if name in raw]
    flags = sum(Basic.Properties.flags[name] for name in present)
    return struct.pack(">H", flags) + b"".join(raw[name] for name in present)


def header(raw_properties: bytes) -> bytes:
    """Return the payload of a content header without a body."""
    return struct.pack(">HHQ", Basic.frame_id, 0, 0) + raw_properties


def short_string(text: bytes) -> bytes:
    """Encode a property."""
    return bytes([len(text)]) + text


def long_string(text: bytes) -> bytes:
    """Encode the value of a header."""
    return b"S" + struct.pack(">I", len(text)) + text


def table(*entries: tuple[bytes, bytes]) -> bytes:
    """Encode the headers, from names and encoded values."""
    content = b"".join(short_string(name) + value for name, value in entries)
    return struct.pack(">I", len(content)) + content


def array(*values: bytes) -> bytes:
    """Encode the value of a header that holds encoded values."""
    content = b"".join(values)
    return b"A" + struct.pack(">I", len(content)) + content


async def publish_raw(
    channel: AbstractChannel, body: bytes, raw: Mapping[str, bytes], exchange: str, routing_key: str
) -> None:
    """Publish a persistent message with these encoded properties, confirmed."""
    underlay = await channel.get_underlay_channel()
    sent = RawProperties(properties({"delivery_mode": bytes([aio_pika.DeliveryMode.PERSISTENT]), **raw}))
    await underlay.basic_publish(body, exchange=exchange, routing_key=routing_key, properties=sent, mandatory=True)

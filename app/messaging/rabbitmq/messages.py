"""Clone received messages, so that they can be published again."""

import aio_pika
import structlog
from aio_pika.abc import AbstractIncomingMessage, HeadersType

from app.messaging.envelope import UNDECODABLE
from app.messaging.rabbitmq.undecodable import encodable_headers, headers_within

log = structlog.get_logger(__name__)

# CC and BCC would send the copy to other queues too; and if they are no lists, the broker refuses the copy.
NOT_COPIED = frozenset({UNDECODABLE, "CC", "BCC"})
DEFAULT_FRAME_BYTES = 128 * 1024  # RabbitMQ's
HEADER_FRAME_BYTES = 64  # at most, in a frame with headers: its framing, an empty table and a priority


def clone_message(
    message: AbstractIncomingMessage, headers: HeadersType, frame_bytes: int, added: HeadersType | None = None
) -> aio_pika.Message:
    """Return a persistent copy of a received message, with `headers` and `added`.

    The broker closes a connection that sends headers larger than a frame, so `headers` are dropped to fit `added` in.
    """
    copy = aio_pika.Message(
        message.body,
        headers=dict(added or {}),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        message_id=message.message_id,
        type=message.type,
        timestamp=message.timestamp,
        app_id=message.app_id,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
    sent = encodable_headers({name: value for name, value in headers.items() if name not in NOT_COPIED})
    kept = headers_within(sent, frame_bytes - HEADER_FRAME_BYTES - len(copy.properties.marshal()))
    if len(kept) < len(sent):
        log.warning("rabbitmq.headers_left_out", message_id=message.message_id, left_out=len(sent) - len(kept))
    copy.headers = {**kept, **copy.headers}
    return copy


def frame_limit(message: AbstractIncomingMessage) -> int:
    """Return the maximum frame size in bytes on the connection of this message."""
    return message.channel.connection.connection_tune.frame_max or DEFAULT_FRAME_BYTES  # 0: the broker has no limit

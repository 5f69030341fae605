"""Clone messages that came in, so that they can be published again."""

import aio_pika
import structlog
from aio_pika.abc import AbstractIncomingMessage, HeadersType

from app.messaging.envelope import UNDECODABLE
from app.messaging.rabbitmq.undecodable import encodable, fitting

log = structlog.get_logger(__name__)

# CC and BCC ask the broker to send the copy to other queues, too, and it refuses a copy in which they are no list.
NOT_COPIED = frozenset({UNDECODABLE, "CC", "BCC"})
DEFAULT_FRAME_BYTES = 128 * 1024  # RabbitMQ's
HEADER_FRAME_BYTES = 64  # of a frame with headers, at most: what is around the properties, an empty table, a priority


def clone_message(
    message: AbstractIncomingMessage, headers: HeadersType, frame_bytes: int, story: HeadersType | None = None
) -> aio_pika.Message:
    """Return a persistent message like the one that came in, with these headers and `story`, to be published instead.

    The broker closes a connection that sends headers larger than a frame, so headers make room for the story.
    """
    copy = aio_pika.Message(
        message.body,
        headers=dict(story or {}),
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
    sent = encodable({name: value for name, value in headers.items() if name not in NOT_COPIED})
    kept = fitting(sent, frame_bytes - HEADER_FRAME_BYTES - len(copy.properties.marshal()))
    if len(kept) < len(sent):
        log.warning("rabbitmq.headers_left_out", message_id=message.message_id, left_out=len(sent) - len(kept))
    copy.headers = {**kept, **copy.headers}
    return copy


def frame_limit(message: AbstractIncomingMessage) -> int:
    """Return how many bytes a frame may have on the connection of this message; the broker says 0 for no limit."""
    return message.channel.connection.connection_tune.frame_max or DEFAULT_FRAME_BYTES

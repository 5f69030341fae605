"""One delivery, from the broker to its end: what every subscription does with a message."""

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog

from app.errors import Unavailable
from app.messaging.consumer import Consumer, Dead, Handled, Retry, unreadable
from app.messaging.envelope import UnreadableMessage, parse
from app.observability import log_fields

log = structlog.get_logger(__name__)

DATABASE_PAUSE_SECONDS = (
    1.0  # between attempts while Postgres is down or too slow; the broker keeps the message unacknowledged
)


async def handle_to_end(
    consumer: Consumer, headers: Mapping[str, Any], body: bytes, ended: asyncio.Event
) -> Handled | Dead | None:
    """Handle a message, with all its retries. None: `ended` was set before; the broker must deliver it again."""
    try:
        envelope = parse(headers, body)
    except UnreadableMessage as error:
        return unreadable(f"unreadable: {error}")
    log_fields.bind(**envelope.log_fields())  # the delivery's task ends with it
    while True:
        try:
            result = await consumer.handle(envelope)
        except Unavailable as error:
            log.warning("consumer.waiting", error=str(error))
            pause = DATABASE_PAUSE_SECONDS
        else:
            if not isinstance(result, Retry):
                return result
            pause = result.in_seconds
        if await is_set_within(ended, pause):
            return None


def failure_headers(dead: Dead) -> dict[str, str | int]:
    """Return the headers that a dead letter has in addition to the message's own."""
    return {
        "x-reason": dead.reason,
        "x-attempts": dead.attempts,
        "x-first-failure-at": dead.first_failure_at.isoformat(),
        "x-last-failure-at": dead.last_failure_at.isoformat(),
    }


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for the event for up to `seconds`; return whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False

"""Make dead letters as the consumer does, and inspect their queue as another client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, HeadersType

from app import db
from app.messaging.consumer import Consumer
from app.messaging.dead_letters import DeadLetterScan
from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.dead_letters import RabbitDeadLetters
from app.messaging.rabbitmq.subscription import RabbitSubscription
from app.messaging.topology import EXCHANGE
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary
from tests.harness.events import event
from tests.harness.messages import take
from tests.harness.operating import OPERATOR
from tests.harness.queues import DEAD_LETTER_QUEUE, SAGA_QUEUE, queue_of
from tests.harness.wait import AMPLE_SECONDS, wait_until

REASON = "ValueError: no such thing"


def in_queue(pool: db.Pool, url: str, consumer: str = "effects", signals: Signals | None = None) -> DeadLetters:
    """Return the dead letters of the consumer that `Effects` makes."""
    queue = queue_of(consumer)
    return DeadLetters(pool, queue, RabbitDeadLetters(pool, url, queue, signals or Signals()))


def scan(pool: db.Pool, url: str) -> contextlib.AbstractAsyncContextManager[DeadLetterScan]:
    """Start a scan of the dead-letter queue."""
    return RabbitDeadLetters(pool, url, SAGA_QUEUE, Signals()).scan()


async def go_over(
    letters: DeadLetters, action: DeadLetterAction, *, dry_run: bool = False, **selection: Any
) -> tuple[Summary, list[Finding]]:
    """Run one scan; return its summary and findings."""
    findings: list[Finding] = []
    actor = None if dry_run or action is DeadLetterAction.PEEK else OPERATOR
    summary = await letters.scan(action, Selection(**selection), findings.append, actor=actor)
    return summary, findings


async def ids(letters: DeadLetters, **selection: Any) -> list[str]:
    """Peek, and return the ids."""
    _, findings = await go_over(letters, DeadLetterAction.PEEK, **selection)
    return [finding.letter.id for finding in findings]


@contextlib.asynccontextmanager
async def consuming(url: str, consumer: Consumer) -> AsyncIterator[None]:
    """Run a subscription until the end of the block."""
    subscription = RabbitSubscription(url, consumer, SAGA_QUEUE, 10)
    task = asyncio.create_task(subscription.run())
    try:
        yield
    finally:
        subscription.stop()
        await task


async def set_aside(channel: AbstractChannel, envelope: Envelope, minutes_ago: float = 0, **properties: Any) -> None:
    """Publish a dead letter, as the consumer does after seven failures."""
    at = (datetime.now(UTC) - timedelta(minutes=minutes_ago)).isoformat()
    failures: HeadersType = {"x-reason": REASON, "x-attempts": 7, "x-first-failure-at": at, "x-last-failure-at": at}
    message = aio_pika.Message(
        envelope.body(),
        headers={**envelope.headers(), **failures},
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        **{"message_id": str(envelope.id), "type": envelope.type, **properties},
    )
    await channel.default_exchange.publish(message, DEAD_LETTER_QUEUE)


async def send(channel: AbstractChannel, body: bytes, **properties: Any) -> None:
    """Publish any message, as any client can."""
    exchange = await channel.get_exchange(EXCHANGE, ensure=False)
    await exchange.publish(aio_pika.Message(body, **properties), "order.placed")


async def holds(channel: AbstractChannel, number: int, name: str = DEAD_LETTER_QUEUE) -> None:
    """Wait until the queue has `number` messages. Those of a closed connection return a moment later."""

    async def counted() -> bool:
        queue = await channel.declare_queue(name, passive=True)
        return queue.declaration_result.message_count == number

    await wait_until(counted, AMPLE_SECONDS, f"{number} messages in {name}")


async def drained(channel: AbstractChannel, name: str = DEAD_LETTER_QUEUE) -> list[str | None]:
    """Empty the queue; return the ids, in order."""
    found = []
    while message := await take(channel, name):
        found.append(message.message_id)
    return found


async def put_many(channel: AbstractChannel, number: int) -> list[str]:
    """Publish `number` dead letters with `set_aside`; return their ids."""
    events = [event() for _ in range(number)]
    for envelope in events:
        await set_aside(channel, envelope)
    await holds(channel, number)
    return [str(envelope.id) for envelope in events]

"""The in-process transport: delivers the relay's messages to the consumers of the same process, without a broker.

A row counts as published when its handlers' transactions have committed; without a handler, at once. When a handler has
used up its attempts, the row is parked: the parked rows of a queue's event types are its dead letters.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from app import db
from app.messaging import outbox_admin
from app.messaging.consumer import Consumer, Dead, Handled, Retry
from app.messaging.envelope import Envelope
from app.messaging.facts import MessageDeadLettered
from app.messaging.outbox_dead_letters import OutboxDeadLetters
from app.messaging.relay import UNCONFIRMED, PublishResult, Refusal
from app.messaging.topology import QueueSpec

NAME = "in-process"


class LocalTransport:
    """Delivers each message to every consumer that handles its type."""

    def __init__(self) -> None:
        self.consumers: list[Consumer] = []

    async def ready(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float = math.inf, results: list[PublishResult] | None = None
    ) -> list[PublishResult]:
        """Deliver the messages for up to `seconds`, those of a chunk at the same time, so consumers can gather them.

        They may take effect in any order: the relay hands over one event of a subject at a time. Raises Unavailable.
        """
        outcomes: list[PublishResult] = [UNCONFIRMED] * len(envelopes) if results is None else results
        ends_at = time.monotonic() + seconds

        async def deliver(index: int) -> None:
            outcomes[index] = await self._deliver(envelopes[index])

        for start in range(0, len(envelopes), db.BATCH_SIZE):
            if time.monotonic() >= ends_at:
                break
            chunk = range(len(envelopes))[start : start + db.BATCH_SIZE]
            errors = await asyncio.gather(*map(deliver, chunk), return_exceptions=True)
            if error := next(filter(None, errors), None):
                raise error
        return outcomes

    async def _deliver(self, envelope: Envelope) -> Refusal | None:
        """Deliver to every consumer, also after one has failed. The row is parked if any of them gave up."""
        refusals: list[Refusal] = []
        for consumer in self.consumers:
            if envelope.type not in consumer.handlers:
                continue
            match await consumer.handle(envelope):
                case Handled():
                    pass
                case Retry(reason=reason):
                    refusals.append(Refusal(reason))
                case Dead(reason=reason, attempts=attempts):
                    consumer.signals.emit(MessageDeadLettered(str(envelope.id), reason, attempts))
                    refusals.append(Refusal(reason, final=True))
        return max(refusals, key=lambda refusal: refusal.final, default=None)


class LocalBroker:
    """The in-process transport behind the broker port."""

    name = NAME
    is_shared = False

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool
        self.transport = LocalTransport()

    def subscribe(
        self,
        queue: QueueSpec,  # noqa: ARG002 - the port's
        consumer: Consumer,
        prefetch: int,  # noqa: ARG002 - the port's
        require: Callable[[], None],  # noqa: ARG002 - the port's
    ) -> None:
        """Register the consumer with the transport."""
        self.transport.consumers.append(consumer)

    def dead_letters(self, queue: QueueSpec, pool: db.Pool) -> OutboxDeadLetters:
        """Return the parked rows of the queue's event types."""
        return OutboxDeadLetters(pool, queue)

    async def read_depth(self, queue: QueueSpec) -> tuple[int, int]:
        """Count the pending and the parked rows of the queue's event types."""
        async with db.connection(self._pool) as conn:
            return await outbox_admin.depths(conn, queue.event_types)

    def check(self) -> None:
        """Do nothing: there is no connection."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""

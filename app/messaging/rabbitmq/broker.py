"""RabbitMQ behind the broker port. Each purpose has a connection of its own."""

from collections.abc import Callable, Collection

from app import db
from app.errors import BrokerUnavailable
from app.messaging.consumer import Consumer
from app.messaging.rabbitmq.dead_letters import RabbitDeadLetters
from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.rabbitmq.queue_depth import RabbitQueueDepth
from app.messaging.rabbitmq.subscription import RabbitSubscription
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals

NAME = "rabbitmq"


class RabbitBroker:
    """A RabbitMQ server or cluster. Connections are opened at their first use."""

    name = NAME
    is_shared = True

    def __init__(self, url: str, queues: Collection[QueueSpec], patience_seconds: float, signals: Signals) -> None:
        self._url = url
        self._signals = signals
        self.transport = RabbitPublisher(url, queues, patience_seconds)
        self._depth = RabbitQueueDepth(url)

    def subscribe(
        self, queue: QueueSpec, consumer: Consumer, prefetch: int, require: Callable[[], None]
    ) -> RabbitSubscription:
        """Return a subscription over a connection of its own."""
        return RabbitSubscription(self._url, consumer, queue, prefetch, require=require)

    def dead_letters(self, queue: QueueSpec, pool: db.Pool) -> RabbitDeadLetters:
        """Return the dead-letter queue."""
        return RabbitDeadLetters(pool, self._url, queue, self._signals)

    async def read_depth(self, queue: QueueSpec) -> tuple[int, int]:
        """Read the depths from the broker. Raises BrokerUnavailable, also while a queue is missing."""
        return await self._depth.read(queue)

    def check(self) -> None:
        """Raise BrokerUnavailable while the relay's connection is not open; the relay opens it before it has work."""
        if not self.transport.connected:
            raise BrokerUnavailable("the relay is not connected", "the relay is not connected")

    async def close(self) -> None:
        """Close the connections for publishing and for depths. Each subscription closes its own."""
        await self.transport.close()
        await self._depth.close()

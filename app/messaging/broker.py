"""The port to a broker. Implemented by RabbitMQ (`rabbitmq.broker`) and by the in-process transport (`local`)."""

from collections.abc import Callable
from typing import Protocol

from app import db
from app.messaging.consumer import Consumer
from app.messaging.dead_letters import DeadLetterSource
from app.messaging.relay import Transport
from app.messaging.topology import QueueSpec


class Subscription(Protocol):
    """Feeds one consumer until `stop`."""

    async def run(self) -> None:
        """Consume until `stop`."""

    def stop(self) -> None:
        """Take no more messages, finish those in progress, then end."""

    def check(self) -> None:
        """Raise BrokerUnavailable with the reason while it is not consuming."""


class Broker(Protocol):
    """What the service needs of a broker."""

    @property
    def name(self) -> str:
        """The name of the transport, which every relay and consumer of one database must share."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes reach the same messages."""

    @property
    def transport(self) -> Transport:
        """Where the relay publishes."""

    def subscribe(
        self, queue: QueueSpec, consumer: Consumer, prefetch: int, require: Callable[[], None]
    ) -> Subscription | None:
        """Return a subscription that feeds the consumer. None: the transport feeds it.

        `require` raises while this process must not consume.
        """

    def dead_letters(self, queue: QueueSpec, pool: db.Pool) -> DeadLetterSource:
        """Return the dead letters of a queue. `pool`: for what a scan does in Postgres."""

    async def read_depth(self, queue: QueueSpec) -> tuple[int, int]:
        """Return how many messages wait for the queue's consumer, and how many dead letters. Raises Unavailable."""

    def check(self) -> None:
        """Raise BrokerUnavailable while the relay's connection is not open."""

    async def close(self) -> None:
        """Close every connection."""

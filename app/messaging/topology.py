"""The names of exchanges and queues, and which events each queue gets. Pure: each broker declares them itself.

Every queue is bound to the topic exchange `orders.events` with one routing key per event type, and has a dead-letter
queue, which is bound to `orders.dlx` with the queue's name.
"""

from app.values import immutable

EXCHANGE = "orders.events"
DEAD_LETTER_EXCHANGE = "orders.dlx"

# Only a backstop: the consumer counts attempts itself and never requeues a message. So the broker counts how often a
# connection ended with the message unacknowledged: a crash, a restart, or Postgres down for half an hour (the broker's
# `consumer_timeout`). Each such end counts for every unacknowledged message of the connection, healthy ones included.
# RabbitMQ up to 4.2 counts every return; 4.3 counts only failures, and the end of a connection is one. The limit is
# explicit, because 3.x has none by default, and 4.x has 20, which a crash loop reaches within minutes.
# Source: RabbitMQ's manual, "Quorum Queues", poison message handling; release notes of 4.0.
DELIVERY_LIMIT = 100
# Practically no limit, in a form that every release understands. Without the argument, 4.x allows 20 deliveries and
# then drops the dead letter, because this queue has no dead-letter queue of its own. -1 means no limit in 4.x, but 3.10
# then drops a message at its first return.
DEAD_LETTER_DELIVERY_LIMIT = 2**31 - 1


def routing_key(event_type: str) -> str:
    """Return the routing key of an event type: `orders.order.placed.v1` travels as `order.placed`."""
    return event_type.partition(".")[2].rpartition(".")[0]


@immutable
class QueueSpec:
    """A queue and its consumer. `consumer` is the name in the inbox, so it must never change."""

    consumer: str
    name: str
    event_types: tuple[str, ...]

    @property
    def routing_keys(self) -> tuple[str, ...]:
        """The routing keys of the event types."""
        return tuple(routing_key(event_type) for event_type in self.event_types)

    @property
    def dead_letter_queue(self) -> str:
        """The name of the queue where dead letters wait for an operator."""
        return f"{self.name}.dlq"

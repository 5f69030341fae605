"""The queue of the saga's consumer, and queues of tests."""

from app.bootstrap.consumers import CONSUMERS
from app.messaging.topology import QueueSpec

SAGA_QUEUE = CONSUMERS[0].queue
CONSUMER, QUEUE, DEAD_LETTER_QUEUE = SAGA_QUEUE.consumer, SAGA_QUEUE.name, SAGA_QUEUE.dead_letter_queue
ROUTING_KEYS = SAGA_QUEUE.routing_keys


def queue_of(consumer: str) -> QueueSpec:
    """Return the saga's queue with another consumer."""
    return QueueSpec(consumer, QUEUE, SAGA_QUEUE.event_types)

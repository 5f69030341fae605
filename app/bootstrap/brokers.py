"""Make the broker that the settings name. It connects at its first use."""

from collections.abc import Sequence

from app import db
from app.bootstrap.consumers import queues
from app.messaging import local
from app.messaging.broker import Broker
from app.messaging.local import LocalBroker
from app.messaging.rabbitmq import broker as rabbitmq
from app.messaging.rabbitmq.broker import RabbitBroker
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetters

PATIENCE_SECONDS = 5.0  # for commands, which publish nothing but dead letters


def transport_name(url: str) -> str:
    """Return the name of the transport at `url`: that of the broker that `make_broker` returns."""
    return rabbitmq.NAME if url else local.NAME


def make_broker(
    url: str,
    pool: db.Pool,
    signals: Signals,
    patience_seconds: float = PATIENCE_SECONDS,
    specs: Sequence[QueueSpec] = queues(),
) -> Broker:
    """Return RabbitMQ at `url`, or the in-process transport if it is empty."""
    if transport_name(url) == rabbitmq.NAME:
        return RabbitBroker(url, specs, patience_seconds, signals)
    return LocalBroker(pool)


def dead_letters_by_queue(
    pool: db.Pool, broker: Broker, specs: Sequence[QueueSpec] = queues()
) -> dict[str, DeadLetters]:
    """Return the dead letters of every queue, by its name."""
    return {queue.name: DeadLetters(pool, queue, broker.dead_letters(queue, pool)) for queue in specs}

"""Facts about messages, and their metrics."""

from collections.abc import Collection
from uuid import UUID

from prometheus_client import CollectorRegistry, Counter, Gauge

from app.observability.signals import Fact, Signals
from app.values import immutable


@immutable
class MessagePublished(Fact):
    """A relay has recorded that the broker confirmed a message."""

    event_id: UUID


@immutable
class MessageRefused(Fact):
    """The broker refused a message; the relay will retry. `returned`: no queue accepted it."""

    level = "warning"
    event = "relay.refused"
    event_id: UUID
    order_id: str
    attempt: int
    reason: str
    returned: bool


@immutable
class MessageParked(MessageRefused):
    """The broker refused a message too often; it waits for an operator."""

    event = "relay.parked"


@immutable
class BatchFailed(Fact):
    """No message of a batch was confirmed, because the broker is unavailable."""

    messages: int


@immutable
class EventsPending(Fact):
    """Rows of the outbox became pending again: an operator replayed or requeued them."""


@immutable
class EventsResent(Fact):
    """Published rows became pending again, because their orders had not started."""

    messages: int


@immutable
class MessageHandled(Fact):
    """A message has taken effect."""

    event_type: str


@immutable
class DuplicateHandled(Fact):
    """A message was delivered again after it had taken effect."""


@immutable
class HandlerFailed(Fact):
    """A handler raised; its transaction was rolled back."""


@immutable
class MessageDeadLettered(Fact):
    """A message became a dead letter."""

    level = "error"
    event = "consumer.dead_lettered"
    message_id: str
    reason: str
    attempts: int


@immutable
class OutboxMeasured(Fact):
    """How many rows are pending and parked, and the age in seconds of the oldest pending one."""

    pending: int
    oldest_pending_age_seconds: float
    parked: int


@immutable
class QueueMeasured(Fact):
    """How many messages wait for a consumer, and how many dead letters wait for an operator."""

    queue: str
    waiting: int
    dead_letters: int


def install_metrics(signals: Signals, registry: CollectorRegistry, queues: Collection[str]) -> None:
    """Create the metrics, every series at zero, and subscribe them. `queues`: the label values of `queue_depth`."""
    _install_outbox(signals, registry)
    processed = Counter("consumer_processed", "Messages that took effect", registry=registry)
    duplicates = Counter(
        "consumer_dedup_hits", "Deliveries of messages that had taken effect before", registry=registry
    )
    failed = Counter("consumer_failed", "Handler failures", registry=registry)
    dead_lettered = Counter("dlq_messages", "Messages dead-lettered", registry=registry)
    dead_letters = Gauge("dlq_depth", "Dead letters that wait for an operator", registry=registry)
    depth = Gauge("queue_depth", "Messages that wait for a consumer", ["queue"], registry=registry)
    for queue in queues:
        depth.labels(queue)

    dead_by_queue = dict.fromkeys(queues, 0)

    def measured(fact: QueueMeasured) -> None:
        depth.labels(fact.queue).set(fact.waiting)
        dead_by_queue[fact.queue] = fact.dead_letters
        dead_letters.set(sum(dead_by_queue.values()))

    signals.subscribe(MessageHandled, lambda _: processed.inc())
    signals.subscribe(DuplicateHandled, lambda _: duplicates.inc())
    signals.subscribe(HandlerFailed, lambda _: failed.inc())
    signals.subscribe(MessageDeadLettered, lambda _: dead_lettered.inc())
    signals.subscribe(QueueMeasured, measured)


def _install_outbox(signals: Signals, registry: CollectorRegistry) -> None:
    pending = Gauge(
        "outbox_pending",
        "Rows neither published nor parked; as of a second ago, or 10 s while counting is slow",
        registry=registry,
    )
    oldest_age = Gauge("outbox_oldest_pending_age_seconds", "Age of the oldest pending row", registry=registry)
    parked = Gauge("outbox_parked", "Rows that were refused too often", registry=registry)
    published = Counter("outbox_published", "Rows confirmed by the broker", registry=registry)
    publish_failed = Counter(
        "outbox_publish_failed",
        "Failed attempts to publish a row: refused, or in a batch that failed with the broker",
        registry=registry,
    )
    returned = Counter("outbox_returned", "Messages that no queue took", registry=registry)
    resent = Counter(
        "outbox_resent",
        "Published rows that became pending again, because their orders had not started",
        registry=registry,
    )

    def refused(fact: MessageRefused) -> None:
        publish_failed.inc()
        returned.inc(fact.returned)

    def measured(fact: OutboxMeasured) -> None:
        pending.set(fact.pending)
        oldest_age.set(fact.oldest_pending_age_seconds)
        parked.set(fact.parked)

    signals.subscribe(MessagePublished, lambda _: published.inc())
    signals.subscribe(MessageRefused, refused)
    signals.subscribe(MessageParked, refused)
    signals.subscribe(BatchFailed, lambda fact: publish_failed.inc(fact.messages))
    signals.subscribe(EventsResent, lambda fact: resent.inc(fact.messages))
    signals.subscribe(OutboxMeasured, measured)

"""Facts of the idempotency room, and their metrics."""

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter

from app.observability.signals import Fact, Signals
from app.values import immutable


class Source(StrEnum):
    """Where a replayed response was found."""

    POSTGRES = "postgres"
    REDIS = "redis"
    MEMORY = "memory"  # of this process


class Conflict(StrEnum):
    """Why a request was refused because of its key."""

    REUSED = "reused"
    IN_PROGRESS = "in-progress"


@immutable
class ResponseReplayed(Fact):
    """A request got the response that is stored under its key."""

    source: Source


@immutable
class KeyConflicted(Fact):
    """A request was refused because of its key."""

    kind: Conflict


def install_metrics(signals: Signals, registry: CollectorRegistry) -> None:
    """Create the metrics, every series at zero, and subscribe them."""
    replays = Counter("idempotency_cache_hits", "Responses replayed from a stored copy", ["source"], registry=registry)
    for source in Source:
        replays.labels(source)
    conflicts = Counter("idempotency_conflicts", "Requests refused because of their key", ["kind"], registry=registry)
    for kind in Conflict:
        conflicts.labels(kind)
    signals.subscribe(ResponseReplayed, lambda fact: replays.labels(fact.source).inc())
    signals.subscribe(KeyConflicted, lambda fact: conflicts.labels(fact.kind).inc())

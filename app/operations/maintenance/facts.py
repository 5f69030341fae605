"""Facts about maintenance, and their metrics."""

from collections.abc import Collection
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from app.observability.signals import Fact, Signals


@dataclass(frozen=True, slots=True)
class RowsPruned(Fact):
    """Rows past their retention were deleted from a table."""

    table: str
    rows: int


@dataclass(frozen=True, slots=True)
class PruneFailed(Fact):
    """An error ended a table's part of a sweep."""

    table: str


@dataclass(frozen=True, slots=True)
class UnstartedMeasured(Fact):
    """The number of orders that were placed at least a minute ago and have no saga."""

    orders: int


def install_metrics(signals: Signals, registry: CollectorRegistry, tables: Collection[str]) -> None:
    """Create the metrics, every series at zero, and subscribe them. `tables`: the names of the pruned tables."""
    pruned = Counter("janitor_pruned", "Rows deleted after their retention", ["table"], registry=registry)
    failed = Counter("janitor_failures", "Sweeps that an error ended for a table", ["table"], registry=registry)
    for table in tables:
        pruned.labels(table)
        failed.labels(table)
    unstarted = Gauge(
        "orders_unstarted", "Orders placed at least a minute ago whose saga has not started", registry=registry
    )
    signals.subscribe(RowsPruned, lambda fact: pruned.labels(fact.table).inc(fact.rows))
    signals.subscribe(PruneFailed, lambda fact: failed.labels(fact.table).inc())
    signals.subscribe(UnstartedMeasured, lambda fact: unstarted.set(fact.orders))

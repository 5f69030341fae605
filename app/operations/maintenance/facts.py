"""Facts about maintenance, and their metrics."""

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge

from app.observability.signals import Fact, Signals
from app.operations.verify.findings import Invariant
from app.values import immutable


@immutable
class RowsPruned(Fact):
    """Rows past their retention were deleted from a table."""

    table: str
    rows: int


@immutable
class PruneFailed(Fact):
    """An error ended a table's part of a sweep."""

    table: str


@immutable
class UnstartedMeasured(Fact):
    """The number of orders that were placed at least a minute ago and have no saga."""

    orders: int


@immutable
class InvariantExamined(Fact):
    """The janitor verified an invariant. `is_complete`: nothing kept it from examining all that it meant to."""

    invariant: str
    violations: int
    is_complete: bool


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
    violations = Gauge("invariant_violations", "Violations that the janitor found", ["invariant"], registry=registry)
    checked_at = Gauge(
        "invariant_checked_timestamp_seconds",
        "When the janitor last verified an invariant completely; 0: never",
        ["invariant"],
        registry=registry,
    )
    for invariant in Invariant:
        violations.labels(invariant)
        checked_at.labels(invariant)

    def examined(fact: InvariantExamined) -> None:
        violations.labels(fact.invariant).set(fact.violations)
        if fact.is_complete:
            checked_at.labels(fact.invariant).set_to_current_time()

    signals.subscribe(InvariantExamined, examined)
    signals.subscribe(RowsPruned, lambda fact: pruned.labels(fact.table).inc(fact.rows))
    signals.subscribe(PruneFailed, lambda fact: failed.labels(fact.table).inc())
    signals.subscribe(UnstartedMeasured, lambda fact: unstarted.set(fact.orders))

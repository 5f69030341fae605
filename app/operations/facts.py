"""Facts about what operators measure: rows past their age limits, and the state of the database. And their metrics."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.observability.signals import Fact, Signals
from app.operations import ages
from app.values import immutable


@immutable
class AgesMeasured(Fact):
    """How many rows are past their age limit, by table and state, each up to `ages.COUNTED_ROWS`."""

    rows: Mapping[tuple[str, str], int]


@immutable
class DatabaseMeasured(Fact):
    """The age of the oldest snapshot that a session holds, and the dead tuples of the hot tables.

    `oldest_snapshot_age_seconds` is None if the role may not see the sessions of other roles. A table whose statistics
    Postgres does not collect is missing.
    """

    oldest_snapshot_age_seconds: float | None
    dead_tuples: Mapping[str, int]


class SnapshotAge(Collector):
    """A gauge that has no sample while its value is unknown."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauge."""
        family = GaugeMetricFamily(
            "database_oldest_snapshot_age_seconds",
            "Age of the oldest transaction in this database that keeps vacuum from removing dead rows; "
            "absent if the role may not see the sessions of other roles",
        )
        if self.seconds is not None:
            family.add_metric([], self.seconds)
        yield family


def install_metrics(signals: Signals, registry: CollectorRegistry) -> None:
    """Create the metrics, and subscribe them. Those about the database have no samples until the first measurement."""
    overdue = Gauge(
        ages.GAUGE,
        f"Rows past the age limit of their state, up to {ages.COUNTED_ROWS}; states with a metric of their own are not"
        " among them",
        ["table", "state"],
        registry=registry,
    )
    for limit in ages.gauged():
        overdue.labels(limit.table, limit.state)
    dead = Gauge(
        "database_dead_tuples",
        "Estimated dead tuples of a table; absent if Postgres does not count them",
        ["table"],
        registry=registry,
    )
    snapshot = SnapshotAge()
    registry.register(snapshot)

    def set_overdue(fact: AgesMeasured) -> None:
        for (table, state), rows in fact.rows.items():
            overdue.labels(table, state).set(rows)

    def set_database(fact: DatabaseMeasured) -> None:
        snapshot.seconds = fact.oldest_snapshot_age_seconds
        dead.clear()
        for table, tuples in fact.dead_tuples.items():
            dead.labels(table).set(tuples)

    signals.subscribe(AgesMeasured, set_overdue)
    signals.subscribe(DatabaseMeasured, set_database)

"""Signals whose metrics a test can read."""

from collections.abc import Iterator, Mapping

from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.bootstrap import metrics
from app.observability.signals import CrashPoints, Signals, never_crash
from app.saga.steps import PLANS, Plans


class Observed(Signals):
    """Signals with every metric of a process."""

    def __init__(self, crash_points: CrashPoints = never_crash, plans: Plans = PLANS) -> None:
        super().__init__(crash_points)
        self.registry = metrics.install(self, plans=plans)

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """Return the value of one series, None if there is none."""
        return self.registry.get_sample_value(name, dict(labels or {}))

    def samples(self) -> Iterator[Sample]:
        """Return every sample, with its exemplar."""
        return parse_openmetrics(generate_latest(self.registry).decode())  # type: ignore[no-untyped-call] # has no types


def parse_openmetrics(text: str) -> Iterator[Sample]:
    """Return the samples of an OpenMetrics exposition. Raises ValueError if it is malformed."""
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call] # has no types
    return (sample for family in families for sample in family.samples)

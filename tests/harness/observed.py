"""Signals whose metrics a test can read."""

from collections.abc import Mapping

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

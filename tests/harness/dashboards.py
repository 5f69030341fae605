"""The queries of Grafana's dashboards, and how their values move while a system fails."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.harness.processes import REPOSITORY
from tests.harness.prometheus import SCRAPE_SECONDS, Prometheus

DASHBOARDS = REPOSITORY / "deploy" / "grafana" / "dashboards"
RATE_INTERVAL = f"{5 * SCRAPE_SECONDS}s"  # Grafana's is four scrapes or more


@dataclass(frozen=True)
class Target:
    """One query of a panel. Panels on two dashboards are one target."""

    panel: str
    legend: str
    expression: str

    def __str__(self) -> str:
        return f"{self.panel} [{self.legend}]"


def targets() -> Sequence[Target]:
    """Return every query of every dashboard, as Grafana sends it."""
    return list(dict.fromkeys(_targets()))


def _targets() -> Iterator[Target]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for query in panel["targets"]:
                expression = query["expr"].replace("$__rate_interval", RATE_INTERVAL)
                yield Target(panel["title"], query["legendFormat"], expression)


Values = dict[str, list[float]]  # by the labels of a series; a NaN is no value


@dataclass
class Watch:
    """What each query has shown, each second since all was well."""

    prometheus: Prometheus
    targets: Sequence[Target]
    calm_at: float = 0
    shown: dict[Target, Values] = field(default_factory=dict)
    calm: dict[Target, dict[str, float]] = field(default_factory=dict)

    async def begin(self) -> Sequence[Target]:
        """Take the present values as the calm ones; return the queries that have none."""
        self.calm_at = await self._now()
        for target in self.targets:
            values = await self._values(target, self.calm_at)
            self.calm[target] = {labels: samples[0] for labels, samples in values.items()}
        return [target for target, values in self.calm.items() if not values]

    async def look(self, targets: Sequence[Target]) -> None:
        """Read what these queries have shown since."""
        now = await self._now()
        for target in targets:
            self.shown[target] = await self._values(target, now)

    def has_risen(self, target: Target) -> bool:
        """Return whether a series was higher than when all was well; one that appears counts from 0."""
        calm = self.calm[target]
        return any(max(samples) > calm.get(labels, 0) for labels, samples in self.shown[target].items())

    def has_fallen(self, target: Target) -> bool:
        """Return whether a series was lower than when all was well."""
        calm = self.calm[target]
        return any(min(samples) < calm.get(labels, -math.inf) for labels, samples in self.shown[target].items())

    async def _now(self) -> float:
        return await self.prometheus.value("vector(time())") or 0

    async def _values(self, target: Target, until: float) -> Values:
        found = {}
        for series in await self.prometheus.history(target.expression, self.calm_at, until):
            samples = [number for _, text in series["values"] if not math.isnan(number := float(text))]
            if samples:
                found[json.dumps(series["metric"], sort_keys=True)] = samples
        return found

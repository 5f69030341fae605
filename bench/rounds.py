"""Run the windows of all contenders in turns, and compare them within each round."""

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bench.measure import Sample

Window = Callable[[], Awaitable[Sample]]


@dataclass(frozen=True)
class Plan:
    """How much to measure. `smoke`: only prove that a row runs."""

    rounds: int = 5
    seconds: float = 3.0
    smoke: bool = False


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass
class Comparison:
    """A row of the table. `unit` is what the rates count.

    `ratios`: the service's rate ÷ that of each other contender. `cost_ratios`: the same of the processor time per unit,
    own and Postgres's; it is the steadier one where others use the machine. `figures`: absolute, if without a floor.
    """

    unit: str
    contenders: dict[str, Sample] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    cost_ratios: dict[str, Ratio] = field(default_factory=dict)
    figures: dict[str, Ratio] = field(default_factory=dict)


async def compare(unit: str, plan: Plan, windows: Mapping[str, Window], subject: str = "service") -> Comparison:
    """Run each contender once per round, and compare `subject` with each of the others.

    The order is turned round in every second round, so that a drift of the machine favours none.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in windows}
    for number in range(plan.rounds):
        for name in list(windows)[:: -1 if number % 2 else 1]:
            samples[name].append(await windows[name]())
    comparison = Comparison(unit, {name: median_sample(found) for name, found in samples.items()})
    for other in (name for name in windows if name != subject):
        pairs = list(zip(samples[subject], samples[other], strict=True))
        comparison.ratios[other] = ratio([ours.rate / theirs.rate for ours, theirs in pairs])
        comparison.cost_ratios[other] = ratio([ours.total_cpu_us / theirs.total_cpu_us for ours, theirs in pairs])
    return comparison


def ratio(values: list[float]) -> Ratio:
    """Return median and spread."""
    return Ratio(statistics.median(values), min(values), max(values))


def median_sample(samples: list[Sample]) -> Sample:
    """Return the median of each figure."""
    medians: dict[str, Any] = {}
    for column in fields(Sample):
        values = [getattr(sample, column.name) for sample in samples]
        medians[column.name] = None if None in values else statistics.median(values)
    return Sample(**medians)

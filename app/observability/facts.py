"""Facts about background loops, and their metric."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge

from app.observability.signals import Fact, Signals
from app.values import immutable


@immutable
class LoopsStarting(Fact):
    """The process starts these background loops."""

    loops: tuple[str, ...]


@immutable
class LoopSucceeded(Fact):
    """A background loop has completed one run without an error."""

    loop: str


def install_metrics(signals: Signals, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
    """Create the metric and subscribe it.

    A loop has the value 0 until its first success, so that one that never succeeds looks older than any limit.
    """
    succeeded_at = Gauge(
        "loop_last_success_timestamp_seconds",
        "When a background loop of this process last ran without an error; 0: never",
        ["loop"],
        registry=registry,
    )

    def start(fact: LoopsStarting) -> None:
        for loop in fact.loops:
            succeeded_at.labels(loop)

    signals.subscribe(LoopsStarting, start)
    signals.subscribe(LoopSucceeded, lambda fact: succeeded_at.labels(fact.loop).set(clock()))

"""Which fault is injected when. Pure: one seed, duration and list of faults give one schedule."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

PAUSE_SECONDS = (0.5, 3.0)  # between the starts of two faults
WARM_UP_SECONDS = 3.0  # orders flow before the first fault


@dataclass(frozen=True, slots=True)
class FaultKind:
    """A kind of fault. `seconds`: the shortest and longest time it lasts. `component`: what it affects.

    `repair_seconds`: how long the repair takes on two idle cores; the schedule leaves room for it.
    Two faults of one component never overlap; faults of different components do.
    """

    name: str
    component: str
    seconds: tuple[float, float]
    repair_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault of the schedule. `seed` decides its details, such as which process it hits."""

    at_seconds: float
    kind: FaultKind
    seconds: float
    seed: int


def plan(seed: int, duration_seconds: float, kinds: Sequence[FaultKind]) -> list[Injection]:
    """Return injections for `duration_seconds`. Every kind comes once before any comes again."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible schedule needs no secrecy
    injections: list[Injection] = []
    free_at: defaultdict[str, float] = defaultdict(float)
    waiting: list[FaultKind] = []
    now = WARM_UP_SECONDS
    while now < duration_seconds:
        if not waiting:
            waiting = rng.sample(list(kinds), len(kinds))
        kind = next((kind for kind in waiting if free_at[kind.component] <= now), None)
        if kind is not None:
            waiting.remove(kind)
            seconds = rng.uniform(*kind.seconds)
            injections.append(Injection(round(now, 3), kind, round(seconds, 3), rng.randrange(2**32)))
            free_at[kind.component] = now + seconds + kind.repair_seconds + PAUSE_SECONDS[0]
        now += rng.uniform(*PAUSE_SECONDS)
    return injections

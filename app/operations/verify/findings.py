"""What a pass has found so far: suspects, how many orders were examined, and what could not be checked."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple


class Invariant(StrEnum):
    """The invariants of docs/invariants.md."""

    I1 = "I1"
    I2 = "I2"
    I3 = "I3"
    I4 = "I4"
    I5 = "I5"
    I6 = "I6"
    I7 = "I7"
    I8 = "I8"
    I9 = "I9"


MAX_SUSPECTS = 1000  # of one invariant; further ones are only counted, so that memory stays bounded


class Suspicion(NamedTuple):
    """Something that looks wrong. `subject`: the order's id, or what else is affected. `since`: its last change.

    `orders`: orders that are affected, if the subject is none.
    """

    invariant: Invariant
    subject: str
    problem: str
    since: datetime | None = None
    orders: tuple[str, ...] = ()


@dataclass(slots=True)
class Findings:
    """The state of a pass. `overflow`: suspects beyond `MAX_SUSPECTS`, by invariant."""

    suspects: dict[tuple[Invariant, str], Suspicion] = field(default_factory=dict)
    overflow: Counter[Invariant] = field(default_factory=Counter)
    kept: Counter[Invariant] = field(default_factory=Counter)
    examined: Counter[Invariant] = field(default_factory=Counter)
    obstacles: dict[Invariant, list[str]] = field(default_factory=dict)
    notes: dict[Invariant, list[str]] = field(default_factory=dict)

    def suspect(self, suspicions: Iterable[Suspicion]) -> None:
        """Keep suspicions; the first one about a subject stands for the others of its invariant."""
        for suspicion in suspicions:
            key = suspicion.invariant, suspicion.subject
            if key in self.suspects:
                continue
            if self.kept[suspicion.invariant] >= MAX_SUSPECTS:
                self.overflow[suspicion.invariant] += 1
                continue
            self.kept[suspicion.invariant] += 1
            self.suspects[key] = suspicion

    def hinder(self, reason: str, *invariants: Invariant) -> None:
        """Record why these invariants could not be checked completely."""
        for invariant in invariants:
            reasons = self.obstacles.setdefault(invariant, [])
            if reason not in reasons:
                reasons.append(reason)

    def note(self, text: str, *invariants: Invariant) -> None:
        """Record what a check of these invariants covers or leaves out."""
        for invariant in invariants:
            self.notes.setdefault(invariant, []).append(text)

    def count(self, number: int, *invariants: Invariant) -> None:
        """Count examined orders."""
        for invariant in invariants:
            self.examined[invariant] += number

    def of(self, invariant: Invariant) -> Iterator[Suspicion]:
        """Return the suspicions about one invariant."""
        return (suspicion for suspicion in self.suspects.values() if suspicion.invariant is invariant)

"""What the clients of a run saw: each request that was sent for a key, and its response."""

import time
from collections import Counter
from dataclasses import dataclass, field

from load.mix import Behaviour, PlannedOrder

CREATED = 201
NO_ANSWER = "no answer"
HUNG_UP = "hung up"


@dataclass(slots=True)
class KeyHistory:
    """All requests with one key. A request that got no response may have been carried out: its outcome is unknown.

    `due_at`: when the first request was due, on `time.monotonic`.
    """

    order: PlannedOrder
    due_at: float
    outcomes: Counter[str] = field(default_factory=Counter)  # a status, NO_ANSWER or HUNG_UP
    responses: set[tuple[str, bytes]] = field(default_factory=set)  # (Location, body) of each 201; correct: one
    problem: str | None = None  # the last response that was not a 201
    acknowledged_at: float | None = None  # when the first 201 arrived, on `time.monotonic`
    gave_up: bool = False  # the client sent it often enough; the run asked again at the end

    @property
    def is_acknowledged(self) -> bool:
        """Return whether any request got a 201."""
        return bool(self.responses)

    @property
    def acknowledged_seconds(self) -> float | None:
        """Return the time from `due_at` to the first 201.

        None if the client hung up on purpose, which is no measure, or gave up: those are counted instead.
        """
        if self.acknowledged_at is None or self.gave_up or self.order.behaviour is Behaviour.HANGS_UP:
            return None
        return self.acknowledged_at - self.due_at

    @property
    def order_ids(self) -> set[str]:
        """Return the ids that the 201s named."""
        return {location.rpartition("/")[2] for location, _ in self.responses}

    def add(self, status: int, location: str, body: bytes) -> bool:
        """Record a response. Return whether it was a 201."""
        self.outcomes[str(status)] += 1
        if status == CREATED:
            self.acknowledged_at = self.acknowledged_at or time.monotonic()
            self.responses.add((location, body))
            return True
        self.problem = body.decode(errors="replace")[:300]
        return False


class Histories:
    """The histories of all keys of the run, by number."""

    def __init__(self) -> None:
        self.by_number: dict[int, KeyHistory] = {}

    def start(self, order: PlannedOrder, due_at: float) -> KeyHistory:
        """Start the history of a key."""
        history = self.by_number[order.number] = KeyHistory(order, due_at)
        return history

    def unacknowledged(self) -> list[KeyHistory]:
        """Return the keys that have no 201 yet."""
        return [history for history in self.by_number.values() if not history.is_acknowledged]

    def outcomes(self) -> Counter[str]:
        """Return how many requests had each outcome."""
        return sum((history.outcomes for history in self.by_number.values()), Counter())


def percentile(sorted_values: list[float], share: float) -> float | None:
    """Return the value that `share` of the values do not exceed (nearest rank); None if there are none."""
    if not sorted_values:
        return None
    return sorted_values[min(len(sorted_values) - 1, max(0, -int(-len(sorted_values) * share // 1) - 1))]

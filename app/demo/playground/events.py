"""What was done in the playground and what the supervisor did about it, newest first."""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from app.values import immutable

KEPT = 12


@immutable
class Event:
    """Something that happened, in words. `order_id`: the order that it is about; empty: none."""

    at: datetime
    text: str
    order_id: str


class Events:
    """The last KEPT events."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._events: deque[Event] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Event]:
        return reversed(self._events)

    def add(self, text: str, order_id: str = "") -> None:
        """Record an event that happens now."""
        self._events.append(Event(datetime.now(UTC), text[:1].upper() + text[1:], order_id))
        self.changed()

"""What was done in the playground and what the supervisor did about it, newest first."""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from app.values import immutable

KEPT = 12


@immutable
class Event:
    """Something that happened, in words."""

    at: datetime
    text: str


class Events:
    """The last KEPT events."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._events: deque[Event] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Event]:
        return reversed(self._events)

    def add(self, text: str) -> None:
        """Record an event that happens now."""
        self._events.append(Event(datetime.now(UTC), text[:1].upper() + text[1:]))
        self.changed()

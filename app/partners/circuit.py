"""A circuit: spares a partner that fails again and again, and finds out when it is back. It only ever delays a call.

    closed     calls go through; `failures` of them failing in a row open it
    open       for `open_seconds` nobody calls
    half-open  then one caller at a time may try: it fails, and it is open again

Any call that succeeds closes it, whenever that call began: the partner answers.

What a process knows of a partner it keeps for itself: each finds out with a few calls of its own. What it knows grows
old: a circuit that was half-open for a while, with nobody trying, is closed.
"""

import time
from collections.abc import Callable
from enum import IntEnum

from app.partners.ports import Done, Health, NotSent, Outcome, Refused, Unknown


class State(IntEnum):
    """How far a circuit is open, as the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


FORGOTTEN_AFTER = 6.0  # times as long as it was open


class Circuit:
    """One circuit. A caller asks for the `delay` before each call, and says how it went or that it `leave`s.

    `clock`: seconds that only grow. Callers are known by identity.
    """

    def __init__(self, failures: int, open_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._clock = clock
        self._failures = 0  # in a row, while closed
        self._open_until: float | None = None  # None: closed
        self._probe: object | None = None  # who tries, while half-open

    @property
    def state(self) -> State:
        """Where it stands now."""
        if self._open_until is None:
            return State.CLOSED
        if (late := self._clock() - self._open_until) < 0:
            return State.OPEN
        forgotten = self._probe is None and late > FORGOTTEN_AFTER * self._open_seconds
        return State.CLOSED if forgotten else State.HALF_OPEN

    def delay(self, caller: object) -> float | None:
        """None: call. Else how many seconds from now it may be half-open; 0: it is, and somebody else tries.

        Who may try while it is half-open has to `judge` the call or to `leave`: until then nobody else tries.
        """
        state = self.state
        if self._open_until is None or state is State.CLOSED:
            self._open_until = None
            return None
        if state is State.HALF_OPEN and (self._probe is None or self._probe is caller):
            self._probe = caller
            return None
        return max(0.0, self._open_until - self._clock())

    def judge(self, caller: object, outcome: Outcome) -> None:
        """Learn how a call went. Of failures, unless it is closed, only that of the one that tries counts."""
        if not is_failure(outcome):
            self._close()
        elif self._open_until is None:
            self._failures += 1
            if self._failures >= self._limit:
                self._open()
        elif self._probe is caller:
            self._open()

    def leave(self, caller: object) -> None:
        """Let somebody else try, if it was this caller's turn; to be called however its work ended."""
        if self._probe is caller:
            self._probe = None

    def _open(self) -> None:
        self._probe, self._open_until, self._failures = None, self._clock() + self._open_seconds, 0

    def _close(self) -> None:
        self._probe, self._open_until, self._failures = None, None, 0


def is_failure(outcome: Outcome) -> bool:
    """Whether an outcome speaks against the partner itself: out of reach, no answer in time, or none that it means."""
    match outcome:
        case Done() | Refused():
            return False
        case NotSent():
            return True
        case Unknown(health=health):
            return health is not Health.WORKING

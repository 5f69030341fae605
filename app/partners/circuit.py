"""A circuit breaker pauses calls to a partner that keeps failing, and finds out when it works again.

    closed     calls go through; `failures` failed calls in a row open the circuit
    open       for `open_seconds` no call is admitted
    half-open  then one call at a time is admitted as a probe; if it fails, the circuit opens again

Any successful call closes the circuit, whenever that call started: the partner answers.

A circuit only ever delays a call. Each process has its own circuits and learns the state of a partner from its own
calls. A circuit that has been half-open for `FORGOTTEN_AFTER` times `open_seconds` without a probe counts as closed.
"""

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Self

from app.partners.ports import Done, NotSent, Outcome, PartnerHealth, Refused, Unknown


class CircuitState(IntEnum):
    """Whether a circuit is open. The values are those of the metric `partner_circuit_state`."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


FORGOTTEN_AFTER = 6.0  # times `open_seconds`


class Circuit:
    """One circuit. Ask `admit` before each call. `clock` returns seconds that never decrease."""

    def __init__(self, failures: int, open_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._clock = clock
        self._failures = 0  # in a row, while closed
        self._open_until: float | None = None  # None: closed
        self._probe: Permit | None = None  # the permit of the probe, while half-open

    @property
    def state(self) -> CircuitState:
        """Return the current state, which depends on the clock."""
        if self._open_until is None:
            return CircuitState.CLOSED
        if (late := self._clock() - self._open_until) < 0:
            return CircuitState.OPEN
        forgotten = self._probe is None and late > FORGOTTEN_AFTER * self._open_seconds
        return CircuitState.CLOSED if forgotten else CircuitState.HALF_OPEN

    def admit(self) -> "Permit | float":
        """Return a permit for one call, or the seconds until the circuit may be half-open (0: a probe is running)."""
        state = self.state
        if self._open_until is None or state is CircuitState.CLOSED:
            self._open_until = None
            return Permit(self)
        if state is CircuitState.HALF_OPEN and self._probe is None:
            self._probe = Permit(self)
            return self._probe
        return max(0.0, self._open_until - self._clock())

    def close(self) -> None:
        """Admit all calls: the partner is known to answer."""
        self._probe, self._open_until, self._failures = None, None, 0

    def record(self, permit: "Permit", outcome: Outcome) -> None:
        """Count the outcome of a call. While the circuit is not closed, only a failure of the probe counts."""
        if not is_failure(outcome):
            self.close()
        elif self._open_until is None:
            self._failures += 1
            if self._failures >= self._limit:
                self._open()
        elif self._probe is permit:
            self._open()

    def release(self, permit: "Permit") -> None:
        """Let another call be the probe, if this permit belongs to the probe."""
        if self._probe is permit:
            self._probe = None

    def _open(self) -> None:
        self._probe, self._open_until, self._failures = None, self._clock() + self._open_seconds, 0


class Permit:
    """The right to make one call; as a context manager it releases itself.

    Until the probe's permit has recorded an outcome or is released, a half-open circuit admits no other call.
    """

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def record(self, outcome: Outcome) -> None:
        """Report the outcome of the call to the circuit."""
        self._circuit.record(self, outcome)

    def release(self) -> None:
        """Give up the right to call. A second release, or one after `record`, changes nothing."""
        self._circuit.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_failure(outcome: Outcome) -> bool:
    """Return whether an outcome counts against the partner: no connection, no answer in time, or no valid answer."""
    match outcome:
        case Done() | Refused():
            return False
        case NotSent():
            return True
        case Unknown(health=health):
            return health is not PartnerHealth.WORKING

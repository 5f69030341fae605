"""The faults: what they do, how often they strike, and how often they have.

Lose       drops a frame of the protocol, and closes or silences its connection
Eat        drops a frame; everything else arrives
Double     delivers a frame twice
Overtake   delivers a frame after the next one of its name
Block      holds a frame and everything after it until the fault is disarmed, and notifies the sender
Delay      delivers each chunk later
Throttle   limits the bytes per second of all connections together
Blackhole  keeps a connection open, but delivers nothing until the fault is disarmed
Reset      ends a connection with a TCP RST
Refuse     refuses connections until the fault is disarmed

Every fault has a `probability` per opportunity, and `times`, the maximum number of strikes since it was armed. An
opportunity is one frame for faults with a `frame`, one received chunk for Delay and Throttle, one connection for
Blackhole and Reset (each open one at arming, then each new one), and the arming itself for Refuse. No fault strikes a
frame that overtakes another.
"""

import enum
import random
import time
from collections import Counter
from dataclasses import KW_ONLY, dataclass


class Direction(enum.Flag):
    """The direction of a stream."""

    UP = enum.auto()  # from the client to the server
    DOWN = enum.auto()  # from the server to the client
    BOTH = UP | DOWN


@dataclass(frozen=True)
class Fault:
    """The fields of every fault. Equal faults are one fault, with one counter."""

    _: KW_ONLY
    probability: float = 1.0
    times: int | None = None


@dataclass(frozen=True)
class FrameFault(Fault):
    """A fault that affects frames; `frame` is a name that the protocol's module exports."""

    frame: str


@dataclass(frozen=True)
class Lose(FrameFault):
    """Drop a frame, and everything after it in both directions.

    The connection is closed; with `silent` it stays open, and nothing arrives on it until one of its peers closes it.
    """

    _: KW_ONLY
    silent: bool = False


@dataclass(frozen=True)
class Eat(FrameFault):
    """Drop a frame, and deliver the next ones. TCP never does that; it simulates a peer that lost the message."""


@dataclass(frozen=True)
class Double(FrameFault):
    """Deliver a frame twice, one right after the other."""


@dataclass(frozen=True)
class Overtake(FrameFault):
    """Hold a frame until the next one of its name was delivered, or the fault is disarmed."""


@dataclass(frozen=True)
class Block(FrameFault):
    """Hold a frame, and everything that its sender sends after it, until disarmed; notify the sender of start and end.

    Simulates a server that is short of memory or disk. Protocols without such notices send none.
    """


@dataclass(frozen=True)
class Delay(Fault):
    """Deliver each chunk `seconds` later, in order. Chunks already delayed when the fault is disarmed stay delayed."""

    seconds: float
    direction: Direction = Direction.BOTH


@dataclass(frozen=True)
class Throttle(Fault):
    """Limit each direction to `bytes_per_second`, for all connections together: they share one link."""

    bytes_per_second: int
    direction: Direction = Direction.BOTH


@dataclass(frozen=True)
class Blackhole(Fault):
    """Hold all data and the end of the connection, and deliver them when disarmed.

    Simulates a link that breaks and recovers: a COMMIT may arrive long after the client stopped waiting for it.
    """


@dataclass(frozen=True)
class Reset(Fault):
    """End the connection with a TCP RST; data in transit is lost."""


@dataclass(frozen=True)
class Refuse(Fault):
    """Stop listening. Open connections stay, and the port stays reserved."""


class Armed:
    """The armed faults, the dice, and the counts of strikes (`struck`, which disarming keeps)."""

    def __init__(self, dice: random.Random) -> None:
        self.struck: Counter[Fault] = Counter()
        self._dice = dice
        self._strikes: dict[Fault, int] = {}  # since the fault was armed
        self._idle_at: dict[tuple[Throttle, Direction], float] = {}  # when the link will have carried its bytes

    def arm(self, fault: Fault) -> None:
        """Let the fault strike from now on. Arming it again restarts its `times`."""
        self._strikes[fault] = 0

    def disarm(self, fault: Fault | None) -> None:
        """Stop the fault, or all faults. It need not be armed."""
        if fault is None:
            self._strikes.clear()
        else:
            self._strikes.pop(fault, None)

    def has(self, kind: type[Fault]) -> bool:
        """Return whether a fault of this kind is armed."""
        return any(isinstance(fault, kind) for fault in self._strikes)

    def strike(self, fault: Fault) -> bool:
        """Decide whether an armed fault strikes now, and count it if so."""
        if fault.times is not None and self._strikes[fault] >= fault.times:
            return False
        if fault.probability < 1 and self._dice.random() >= fault.probability:
            return False
        self._strikes[fault] += 1
        self.struck[fault] += 1
        return True

    def strike_any(self, kind: type[Fault]) -> bool:
        """Return whether any fault of a kind strikes now; the first that does is counted."""
        return any(isinstance(fault, kind) and self.strike(fault) for fault in self._strikes)

    def strike_frame(self, frame: str) -> FrameFault | None:
        """Return the fault that strikes one frame, None if none does."""
        for fault in self._strikes:
            if isinstance(fault, FrameFault) and fault.frame == frame and self.strike(fault):
                return fault
        return None

    def delay(self, direction: Direction, size: int) -> float:
        """Return by how many seconds a chunk of `size` bytes is delayed, all delays together."""
        return sum(
            fault.seconds if isinstance(fault, Delay) else self._carry(fault, direction, size)
            for fault in self._strikes
            if isinstance(fault, Delay | Throttle) and direction in fault.direction and self.strike(fault)
        )

    def _carry(self, link: Throttle, direction: Direction, size: int) -> float:
        """Queue the chunk on the link. Return in how many seconds its last byte arrives."""
        now = time.monotonic()
        begins = max(now, self._idle_at.get((link, direction), now))
        self._idle_at[link, direction] = begins + size / link.bytes_per_second
        return self._idle_at[link, direction] - now

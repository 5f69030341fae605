"""What can be made to go wrong, how often, and how often it did.

Lose       a frame of the protocol never arrives, and its connection is cut or falls silent
Eat        a frame never arrives, and all else does
Double     a frame arrives twice
Overtake   a frame arrives after the next one of its name
Block      a frame and all that follows it does not arrive until the fault is disarmed, and its sender is told
Delay      each chunk arrives later
Throttle   all connections together carry so many bytes a second
Blackhole  a connection stays open, and nothing arrives until the fault is disarmed
Reset      a connection ends with a TCP RST
Refuse     nobody listens on the port until the fault is disarmed

Every fault takes `probability` (of each single chance to strike) and `times` (at most, counted from arming it).
A chance to strike is one frame for those that name one, one received chunk for Delay and Throttle, one connection for
Blackhole and Reset (each open one at arming, then each new one), and arming itself for Refuse. A frame that overtakes
another is spared.
"""

import enum
import random
import time
from collections import Counter
from dataclasses import KW_ONLY, dataclass


class Direction(enum.Flag):
    """Which way bytes go."""

    UP = enum.auto()  # from the client to the server
    DOWN = enum.auto()  # from the server to the client
    BOTH = UP | DOWN


@dataclass(frozen=True)
class Fault:
    """What every fault has. Equal faults are one fault: they share their counter."""

    _: KW_ONLY
    probability: float = 1.0
    times: int | None = None


@dataclass(frozen=True)
class FrameFault(Fault):
    """What befalls a frame; `frame` is a name that the protocol's module exports."""

    frame: str


@dataclass(frozen=True)
class Lose(FrameFault):
    """Drop a frame, and everything after it in both directions.

    The connection is closed; with `silent` it stays open, and its peers hear nothing more on it until one of them
    closes it.
    """

    _: KW_ONLY
    silent: bool = False


@dataclass(frozen=True)
class Eat(FrameFault):
    """Drop a frame, and deliver what follows it. TCP does no such thing: it stands for a peer that forgot."""


@dataclass(frozen=True)
class Double(FrameFault):
    """Deliver a frame twice, one right after the other."""


@dataclass(frozen=True)
class Overtake(FrameFault):
    """Keep a frame back until the next one of its name has passed it, or the fault is disarmed."""


@dataclass(frozen=True)
class Block(FrameFault):
    """Deliver a frame, and all that its sender sends after it, when disarmed; tell the sender, and when it is over.

    As a server that is short of memory or disk. The telling is left out where the protocol has no words for it.
    """


@dataclass(frozen=True)
class Delay(Fault):
    """Deliver each chunk `seconds` later. Order is kept; what is on its way when disarmed keeps its delay."""

    seconds: float
    direction: Direction = Direction.BOTH


@dataclass(frozen=True)
class Throttle(Fault):
    """Carry `bytes_per_second` each way, all connections together: they share one link."""

    bytes_per_second: int
    direction: Direction = Direction.BOTH


@dataclass(frozen=True)
class Blackhole(Fault):
    """Hold everything back, the end of the connection too, and deliver it when disarmed.

    As on a broken link that heals: a COMMIT that the client gave up long ago may still arrive.
    """


@dataclass(frozen=True)
class Reset(Fault):
    """End the connection with a TCP RST; what was under way is gone."""


@dataclass(frozen=True)
class Refuse(Fault):
    """Stop listening. Open connections live on, and the port stays ours."""


class Armed:
    """The faults that are armed now, the dice, and the count of strikes (`struck`, kept when a fault is disarmed)."""

    def __init__(self, dice: random.Random) -> None:
        self.struck: Counter[Fault] = Counter()
        self._dice = dice
        self._strikes: dict[Fault, int] = {}  # since it was armed
        self._idle_at: dict[tuple[Throttle, Direction], float] = {}  # when the link has carried what it was given

    def arm(self, fault: Fault) -> None:
        """Let it strike from now on. Armed again, it counts its `times` afresh."""
        self._strikes[fault] = 0

    def disarm(self, fault: Fault | None) -> None:
        """Let it, or all of them, strike no more. One that is not armed is no mistake."""
        if fault is None:
            self._strikes.clear()
        else:
            self._strikes.pop(fault, None)

    def has(self, kind: type[Fault]) -> bool:
        """Tell whether a fault of this kind is armed."""
        return any(isinstance(fault, kind) for fault in self._strikes)

    def strike(self, fault: Fault) -> bool:
        """Decide one chance of an armed fault, and count it if it strikes."""
        if fault.times is not None and self._strikes[fault] >= fault.times:
            return False
        if fault.probability < 1 and self._dice.random() >= fault.probability:
            return False
        self._strikes[fault] += 1
        self.struck[fault] += 1
        return True

    def strike_any(self, kind: type[Fault]) -> bool:
        """Decide one chance of the faults of a kind: the first that strikes is enough."""
        return any(isinstance(fault, kind) and self.strike(fault) for fault in self._strikes)

    def strike_frame(self, frame: str) -> FrameFault | None:
        """Decide about one frame: the fault that it falls to, None if it passes."""
        for fault in self._strikes:
            if isinstance(fault, FrameFault) and fault.frame == frame and self.strike(fault):
                return fault
        return None

    def delay(self, direction: Direction, size: int) -> float:
        """Decide about one chunk of `size` bytes: by how many seconds it is delayed, all delays together."""
        return sum(
            fault.seconds if isinstance(fault, Delay) else self._carry(fault, direction, size)
            for fault in self._strikes
            if isinstance(fault, Delay | Throttle) and direction in fault.direction and self.strike(fault)
        )

    def _carry(self, link: Throttle, direction: Direction, size: int) -> float:
        """Put the chunk behind what the link has to carry. Returns in how many seconds its last byte has arrived."""
        now = time.monotonic()
        begins = max(now, self._idle_at.get((link, direction), now))
        self._idle_at[link, direction] = begins + size / link.bytes_per_second
        return self._idle_at[link, direction] - now

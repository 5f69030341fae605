"""A circuit delays calls to a partner that fails, tries it with one call at a time, and is never stuck."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.partners.circuit import Circuit, State, is_failure
from app.partners.ports import Done, Health, NotSent, Outcome, Refused, Unknown

FAILURES, OPEN_SECONDS = 3, 10.0
WORKED, FAILED = Done(), Unknown("no answer")

# What happens, in order: `ok` and `bad` are calls that are judged at once, `+4` are seconds; and the state after it.
STORIES = """
                                  | closed
bad bad                           | closed
bad bad bad                       | open
bad bad ok bad bad                | closed
bad bad bad +9                    | open
bad bad bad +10                   | half-open
bad bad bad +70                   | half-open
bad bad bad +71                   | closed
bad bad bad +71 bad bad           | closed
bad bad bad +71 bad bad bad       | open
bad bad bad +10 ok                | closed
bad bad bad +10 bad               | open
bad bad bad +10 bad +10           | half-open
bad bad bad +10 bad +10 ok        | closed
bad bad bad +10 ok bad bad        | closed
bad bad bad +10 ok bad bad bad    | open
"""

OUTCOMES = [
    (Done(), False),
    (Refused("card-declined"), False),
    (NotSent("no connection"), True),
    (Unknown("no answer within 10 s"), True),
    (Unknown("503 unavailable", retry_after_seconds=1), True),
    (Unknown("201 unreadable answer", health=Health.BROKEN), True),
    (Unknown("409 undone", health=Health.WORKING), False),
    (Unknown("401 unexpected answer", our_fault=True, health=Health.WORKING), False),
]


@dataclass
class Timed:
    """A circuit and the clock it looks at."""

    now: float = 1000.0
    circuit: Circuit = field(init=False)

    def __post_init__(self) -> None:
        self.circuit = Circuit(FAILURES, OPEN_SECONDS, lambda: self.now)

    def call(self, outcome: Outcome) -> None:
        """Make a call that must be allowed, and judge it."""
        caller = object()
        assert self.circuit.delay(caller) is None
        self.circuit.judge(caller, outcome)


@pytest.fixture
def opened() -> Timed:
    timed = Timed()
    for _ in range(FAILURES):
        timed.call(FAILED)
    return timed


@pytest.fixture
def half_open(opened: Timed) -> Timed:
    opened.now += OPEN_SECONDS
    return opened


@pytest.mark.parametrize("line", STORIES.strip("\n").splitlines())
def test_failures_in_a_row_open_it_time_half_opens_it_and_one_call_decides(line: str) -> None:
    story, _, state = line.partition("|")
    timed = Timed()
    for happening in story.split():
        if happening.startswith("+"):
            timed.now += float(happening)
        else:
            timed.call(WORKED if happening == "ok" else FAILED)
    assert timed.circuit.state.name.lower().replace("_", "-") == state.strip()


@pytest.mark.parametrize(("outcome", "failure"), OUTCOMES)
def test_only_what_speaks_against_the_partner_itself_is_a_failure(outcome: Outcome, failure: bool) -> None:
    assert is_failure(outcome) == failure


def test_while_it_is_open_everybody_waits_until_it_may_be_half_open(opened: Timed) -> None:
    opened.now += 4
    assert opened.circuit.delay(object()) == pytest.approx(OPEN_SECONDS - 4)


def test_while_one_tries_all_others_wait_and_the_one_may_ask_again(half_open: Timed) -> None:
    one, other = object(), object()
    assert half_open.circuit.delay(one) is None
    assert half_open.circuit.delay(other) == 0.0
    assert half_open.circuit.delay(one) is None


def test_one_that_tries_is_not_forgotten(half_open: Timed) -> None:
    assert half_open.circuit.delay(object()) is None
    half_open.now += 1000
    assert half_open.circuit.state is State.HALF_OPEN
    assert half_open.circuit.delay(object()) == 0.0


def test_one_that_tries_no_more_leaves_its_turn_to_another(half_open: Timed) -> None:
    one, other = object(), object()
    assert half_open.circuit.delay(one) is None
    half_open.circuit.leave(other)
    assert half_open.circuit.delay(other) == 0.0
    half_open.circuit.leave(one)
    assert half_open.circuit.delay(other) is None


def test_a_failure_that_began_before_it_opened_decides_nothing(opened: Timed) -> None:
    opened.circuit.judge(object(), FAILED)
    assert opened.circuit.delay(object()) == OPEN_SECONDS
    opened.now += OPEN_SECONDS
    prober = object()
    assert opened.circuit.delay(prober) is None
    opened.circuit.judge(object(), FAILED)
    assert opened.circuit.state is State.HALF_OPEN
    assert opened.circuit.delay(prober) is None


def test_any_success_closes_it(opened: Timed, half_open: Timed) -> None:
    for each in (opened, half_open):
        each.circuit.judge(object(), WORKED)
        assert each.circuit.state is State.CLOSED


class Crowd(RuleBasedStateMachine):
    """Any number of callers, in any order, some of which die before they judge (and leave)."""

    def __init__(self) -> None:
        super().__init__()
        self.timed = Timed()
        self.calling: list[object] = []
        self.trying: list[object] = []  # those let through while it was not closed

    @rule(seconds=st.sampled_from([0.5, 3.0, OPEN_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.timed.now += seconds

    @rule()
    def arrive(self) -> None:
        caller, closed = object(), self.timed.circuit.state is State.CLOSED
        delay = self.timed.circuit.delay(caller)
        if delay is None:
            self.calling.append(caller)
            self.trying += [] if closed else [caller]
        else:
            assert 0 <= delay <= OPEN_SECONDS
            assert not closed

    def end(self, which: int, how: Callable[[object], None]) -> None:
        caller = self.calling.pop(which % len(self.calling))
        how(caller)
        self.timed.circuit.leave(caller)
        if caller in self.trying:
            self.trying.remove(caller)

    @precondition(lambda self: self.calling)
    @rule(which=st.integers(0, 99), outcome=st.sampled_from([WORKED, FAILED, FAILED]))
    def judge(self, which: int, outcome: Outcome) -> None:
        self.end(which, lambda caller: self.timed.circuit.judge(caller, outcome))
        if outcome is WORKED:
            assert self.timed.circuit.state is State.CLOSED
            self.trying.clear()  # it may end as it likes

    @precondition(lambda self: self.calling)
    @rule(which=st.integers(0, 99))
    def die(self, which: int) -> None:
        self.end(which, lambda _: None)

    @invariant()
    def one_at_a_time_tries(self) -> None:
        assert len(self.trying) <= 1

    @invariant()
    def it_is_never_stuck(self) -> None:
        """With nobody trying, whoever comes after the longest wait is let through."""
        if not self.trying:
            now, caller = self.timed.now, object()
            self.timed.now += OPEN_SECONDS
            assert self.timed.circuit.delay(caller) is None
            self.timed.circuit.leave(caller)
            self.timed.now = now


TestCrowd = Crowd.TestCase

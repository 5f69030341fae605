"""A circuit delays calls to a failing partner, probes it with one call at a time, and is never stuck."""

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.partners.circuit import Circuit, CircuitState, Permit, is_failure
from app.partners.ports import Done, NotSent, Outcome, PartnerHealth, Refused, Unknown

FAILURES, OPEN_SECONDS = 3, 10.0
WORKED, FAILED = Done(), Unknown("no answer")

# What happens, in order (`ok` and `bad`: calls with that outcome; `+4`: seconds), and the state after it.
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
    (Unknown("201 unreadable answer", health=PartnerHealth.BROKEN), True),
    (Unknown("409 undone", health=PartnerHealth.WORKING), False),
    (Unknown("401 unexpected answer", our_fault=True, health=PartnerHealth.WORKING), False),
]


@dataclass
class Timed:
    """A circuit and its clock."""

    now: float = 1000.0
    circuit: Circuit = field(init=False)

    def __post_init__(self) -> None:
        self.circuit = Circuit(FAILURES, OPEN_SECONDS, lambda: self.now)

    def admit(self) -> Permit:
        """Return the permit for a call that must be admitted."""
        admitted = self.circuit.admit()
        assert isinstance(admitted, Permit), f"not admitted for {admitted} s"
        return admitted

    def delay(self) -> float:
        """Return how long a call must wait. Fails if the circuit admits it."""
        admitted = self.circuit.admit()
        assert not isinstance(admitted, Permit)
        return admitted

    def call(self, outcome: Outcome) -> None:
        """Make a call that must be admitted, and record its outcome."""
        with self.admit() as permit:
            permit.record(outcome)


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
def test_failures_time_and_one_probe_decide_the_state(line: str) -> None:
    """Failures in a row open a circuit, time half-opens it, and then one call decides."""
    story, _, state = line.partition("|")
    timed = Timed()
    for happening in story.split():
        if happening.startswith("+"):
            timed.now += float(happening)
        else:
            timed.call(WORKED if happening == "ok" else FAILED)
    assert timed.circuit.state.name.lower().replace("_", "-") == state.strip()


@pytest.mark.parametrize(("outcome", "failure"), OUTCOMES)
def test_only_outcomes_against_the_partner_are_failures(outcome: Outcome, failure: bool) -> None:
    assert is_failure(outcome) == failure


def test_while_open_every_call_waits_until_half_open(opened: Timed) -> None:
    opened.now += 4
    assert opened.delay() == pytest.approx(OPEN_SECONDS - 4)


def test_while_a_probe_runs_all_other_calls_wait(half_open: Timed) -> None:
    """A half-open circuit admits one call at a time, and another one as soon as the first has been released."""
    with half_open.admit():
        assert half_open.delay() == 0.0
        assert half_open.delay() == 0.0
    half_open.admit()


def test_a_probe_that_is_out_for_long_is_not_forgotten(half_open: Timed) -> None:
    half_open.admit()
    half_open.now += 1000
    assert half_open.circuit.state is CircuitState.HALF_OPEN
    assert half_open.delay() == 0.0


def test_only_the_probe_can_release_the_probe(half_open: Timed) -> None:
    """A permit of another call, or one that was released before, does not admit a second probe."""
    other = Timed().admit()
    former = half_open.admit()
    former.release()
    probe = half_open.admit()
    for permit in (former, other):
        permit.release()
        assert half_open.delay() == 0.0
    probe.release()
    half_open.admit()


def test_an_exception_releases_the_probe(half_open: Timed) -> None:
    """A call that ends without an outcome lets the next call be the probe."""
    with pytest.raises(RuntimeError), half_open.admit():
        raise RuntimeError("the call broke")
    half_open.admit()


def test_releasing_after_the_outcome_changes_nothing(half_open: Timed) -> None:
    """The failed probe has opened the circuit again; its release neither closes it nor admits another probe."""
    permit = half_open.admit()
    permit.record(FAILED)
    half_open.now += OPEN_SECONDS
    half_open.admit()
    permit.release()
    assert half_open.delay() == 0.0


def test_a_failure_of_an_earlier_call_decides_nothing() -> None:
    """A call that was admitted before the circuit opened, and fails after that, neither opens it nor is the probe."""
    timed = Timed()
    early, late = timed.admit(), timed.admit()
    for _ in range(FAILURES):
        timed.call(FAILED)
    early.record(FAILED)
    assert timed.delay() == OPEN_SECONDS
    timed.now += OPEN_SECONDS
    timed.admit()
    late.record(FAILED)
    assert timed.circuit.state is CircuitState.HALF_OPEN
    assert timed.delay() == 0.0


@pytest.mark.parametrize("seconds", [0, OPEN_SECONDS], ids=["open", "half-open"])
def test_any_success_closes_it(seconds: float) -> None:
    """A success closes the circuit, no matter when its call was admitted, because the partner answers."""
    timed = Timed()
    early = timed.admit()
    for _ in range(FAILURES):
        timed.call(FAILED)
    timed.now += seconds
    early.record(WORKED)
    assert timed.circuit.state is CircuitState.CLOSED


def test_closing_admits_all_calls_while_a_probe_runs(half_open: Timed) -> None:
    """A success elsewhere closes the circuit, and what the probe finds afterwards counts like any other outcome."""
    probe = half_open.admit()
    half_open.circuit.close()
    half_open.admit()
    probe.record(FAILED)
    assert half_open.circuit.state is CircuitState.CLOSED


class Crowd(RuleBasedStateMachine):
    """Any number of callers, in any order; some of them die before they record an outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.timed = Timed()
        self.calling: list[Permit] = []
        self.probing: list[Permit] = []  # those admitted while it was not closed

    @rule(seconds=st.sampled_from([0.5, 3.0, OPEN_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.timed.now += seconds

    @rule()
    def arrive(self) -> None:
        closed = self.timed.circuit.state is CircuitState.CLOSED
        admitted = self.timed.circuit.admit()
        if isinstance(admitted, Permit):
            self.calling.append(admitted)
            self.probing += [] if closed else [admitted]
        else:
            assert 0 <= admitted <= OPEN_SECONDS
            assert not closed

    def end(self, which: int, outcome: Outcome | None) -> None:
        with self.calling.pop(which % len(self.calling)) as permit:
            if outcome is not None:
                permit.record(outcome)
        if permit in self.probing:
            self.probing.remove(permit)

    @precondition(lambda self: self.calling)
    @rule(which=st.integers(0, 99), outcome=st.sampled_from([WORKED, FAILED, FAILED]))
    def record(self, which: int, outcome: Outcome) -> None:
        self.end(which, outcome)
        if outcome is WORKED:
            assert self.timed.circuit.state is CircuitState.CLOSED
            self.probing.clear()  # its outcome counts like any other

    @precondition(lambda self: self.calling)
    @rule(which=st.integers(0, 99))
    def die(self, which: int) -> None:
        self.end(which, None)

    @invariant()
    def at_most_one_probe_is_out(self) -> None:
        assert len(self.probing) <= 1

    @invariant()
    def it_is_never_stuck(self) -> None:
        """Without a probe, a call that arrives after the longest wait is admitted."""
        if not self.probing:
            now = self.timed.now
            self.timed.now += OPEN_SECONDS
            with self.timed.admit():
                pass
            self.timed.now = now


TestCrowd = Crowd.TestCase

"""The saga's plan: which call follows each state and outcome, and what holds on every way through it."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.orders.model import Reason, Status
from app.partners.ports import Done, NotSent, Outcome, Refused, Unknown
from app.saga import plan, steps
from app.saga.plan import Call, Finish, SagaDirection, SagaState
from app.saga.steps import Action, Step
from tests.harness.observed import Observed

# `undone` stands for every code that is not in the plan: it never counts as a refusal.
CODES = ("out-of-stock", "card-declined", "hold-expired", "undeliverable", "undone")
OUTCOMES: dict[str, Outcome] = {
    "done": Done(),
    **{code: Refused(code) for code in CODES},
    "not-sent": NotSent("nobody there"),
    "unknown": Unknown("no answer"),
    "our-fault": Unknown("422 invalid-request", our_fault=True),
}

FINAL_STATUSES = {
    Reason.TIMED_OUT: Status.REJECTED,
    Reason.CANCELLED_BY_CUSTOMER: Status.CANCELLED,
}  # and the final status

CUSTOMER, OPERATOR = Reason.CANCELLED_BY_CUSTOMER, Reason.COMPENSATED_BY_OPERATOR
# The next call if nothing interrupts; if the customer has cancelled (late or not); if the saga is late.
# `again`: the same call, later. `other`: every outcome without its own line.
NEXT_CALLS = """
do reserve_inventory   | done          | do charge_payment      | undo reserve_inventory | undo reserve_inventory
                       | out-of-stock  | undo reserve_inventory | undo reserve_inventory | undo reserve_inventory
                       | other         | again                  | undo reserve_inventory | undo reserve_inventory
do charge_payment      | done          | do commit_inventory    | undo charge_payment    | undo charge_payment
                       | card-declined | undo charge_payment    | undo charge_payment    | undo charge_payment
                       | other         | again                  | undo charge_payment    | undo charge_payment
do commit_inventory    | done          | do create_shipment     | undo charge_payment    | undo charge_payment
                       | hold-expired  | undo charge_payment    | undo charge_payment    | undo charge_payment
                       | other         | again                  | undo charge_payment    | undo charge_payment
do create_shipment     | done          | finish confirmed       | undo create_shipment   | finish confirmed
                       | undeliverable | undo create_shipment   | undo create_shipment   | undo create_shipment
                       | other         | again                  | undo create_shipment   | undo create_shipment
undo create_shipment   | done          | undo charge_payment    | undo charge_payment    | undo charge_payment
                       | other         | again                  | again                  | again
undo charge_payment    | done          | undo reserve_inventory | undo reserve_inventory | undo reserve_inventory
                       | other         | again                  | again                  | again
undo reserve_inventory | done          | finish rejected        | finish rejected        | finish rejected
                       | other         | again                  | again                  | again
"""

# For any reason; the two tests of a saga that has done every step cover the exceptions.
COMPENSATION_BEFORE_AND_AFTER_THE_FIRST_ATTEMPT = """
do reserve_inventory   | finish rejected        | undo reserve_inventory
do charge_payment      | undo reserve_inventory | undo charge_payment
do commit_inventory    | undo charge_payment    | undo charge_payment
do create_shipment     | undo charge_payment    | undo create_shipment
undo create_shipment   | undo create_shipment   | undo create_shipment
undo charge_payment    | undo charge_payment    | undo charge_payment
undo reserve_inventory | undo reserve_inventory | undo reserve_inventory
finish rejected        | finish rejected        | finish rejected
"""


def rows(table: str) -> list[list[str]]:
    """Read a table; an empty first cell repeats the one above."""
    found: list[list[str]] = []
    for line in table.strip().splitlines():
        first, *others = (cell.strip() for cell in line.split("|"))
        found.append([first or found[-1][0], *others])
    return found


LINES = rows(NEXT_CALLS)
NAMED = {(call, outcome) for call, outcome, *_ in LINES}
CASES = [
    (call, name, *then)
    for call, outcome, *then in LINES
    for name in OUTCOMES
    if outcome == name or (outcome == "other" and (call, name) not in NAMED)
]


def state(words: str, attempts: int = 0) -> SagaState:
    """Return the state that asks for `do …`, `undo …`, or `finish …`."""
    verb, _, noun = words.partition(" ")
    forward = verb == "do" or noun == "confirmed"
    return SagaState(
        steps.NEWEST,
        SagaDirection.FORWARD if forward else SagaDirection.BACKWARD,
        None if verb == "finish" else Step(noun),
        attempts,
        None if forward else Reason.OUT_OF_STOCK,
    )


def words(decision: plan.Decision) -> str:
    """Return a decision in the words of the tables."""
    match decision:
        case Call(step, action):
            return f"{action} {step}"
        case Finish(status):
            return f"finish {status}"


def test_table_has_every_call_and_outcome_once() -> None:
    calls = [
        words(call)
        for version, table in steps.PLANS.items()
        for direction, row in product(SagaDirection, table)
        if direction is SagaDirection.FORWARD or row.undo is not None
        if isinstance(call := plan.decide(SagaState(version, direction, row.step)), Call)
    ]
    refusals = {str(code) for table in steps.PLANS.values() for row in table for code in row.refusals}
    assert {"done", "not-sent", "unknown", "our-fault", "undone"} | refusals == OUTCOMES.keys()
    assert sorted((call, name) for call, name, *_ in CASES) == sorted(product(calls, OUTCOMES))


@pytest.mark.parametrize(("call", "outcome", "then", "cancelled", "late"), CASES)
def test_next_call(call: str, outcome: str, then: str, cancelled: str, late: str) -> None:
    """A call, its outcome and an interruption meanwhile decide the next call."""
    before = state(call, attempts=3)
    after = plan.advance(before, OUTCOMES[outcome])
    reason = outcome if call.startswith("do") and then.startswith("undo") else before.reason
    for word, is_late, expected, why in (
        (None, False, then, None),
        (CUSTOMER, False, cancelled, CUSTOMER),
        (CUSTOMER, True, cancelled, CUSTOMER),  # a cancel takes precedence over the deadline
        (OPERATOR, False, cancelled, OPERATOR),
        (OPERATOR, True, cancelled, OPERATOR),
        (None, True, late, Reason.TIMED_OUT),
    ):
        interrupted = plan.interrupt(after, cancelled=word, late=is_late)
        if expected == "again":
            assert interrupted == before
        else:
            assert (words(plan.decide(interrupted)), interrupted.attempts) == (expected, 0)
            # The first reason stays; without one, the interruption is the reason.
            assert interrupted.reason == (why if expected.startswith("undo") and reason is None else reason)


@pytest.mark.parametrize(("call", "unattempted", "attempted"), rows(COMPENSATION_BEFORE_AND_AFTER_THE_FIRST_ATTEMPT))
def test_compensation_starts_at_the_latest_attempted_step(call: str, unattempted: str, attempted: str) -> None:
    for (attempts, then), reason in product(((0, unattempted), (1, attempted), (9, attempted)), FINAL_STATUSES):
        after = plan.decide(plan.compensate(state(call, attempts), reason))
        unfinished = then != "finish rejected" or call == then
        assert words(after) == (then if unfinished else f"finish {FINAL_STATUSES[reason]}")


@pytest.mark.parametrize("call", ["undo create_shipment", "undo charge_payment", "undo reserve_inventory"])
@pytest.mark.parametrize("reason", FINAL_STATUSES)
def test_compensating_saga_keeps_its_reason(call: str, reason: Reason) -> None:
    assert plan.compensate(state(call, 2), reason) == state(call, 2)


@pytest.mark.parametrize(("reason", "status"), FINAL_STATUSES.items())
def test_final_status_after_compensation(reason: Reason, status: Status) -> None:
    """An order ends cancelled if its customer cancelled it, otherwise rejected."""
    last = replace(state("undo reserve_inventory", 1), reason=reason)
    assert plan.decide(plan.advance(last, Done())) == Finish(status)


def test_cancel_after_the_last_step_undoes_all_steps() -> None:
    at = plan.compensate(state("finish confirmed"), Reason.CANCELLED_BY_CUSTOMER)
    undone = []
    while isinstance(call := plan.decide(at), Call):
        undone.append(words(call))
        at = plan.advance(plan.count_attempt(at), Done())
    assert undone == ["undo create_shipment", "undo charge_payment", "undo reserve_inventory"]
    assert call == Finish(Status.CANCELLED)


def test_deadline_after_the_last_step_changes_nothing() -> None:
    done = state("finish confirmed")
    assert plan.compensate(done, Reason.TIMED_OUT) == plan.interrupt(done, cancelled=None, late=True) == done


@pytest.mark.parametrize("call", ["undo create_shipment", "undo charge_payment", "undo reserve_inventory"])
def test_nothing_interrupts_a_compensating_saga(call: str) -> None:
    assert plan.interrupt(state(call, 2), cancelled=CUSTOMER, late=True) == state(call, 2)


def test_saga_begins_with_its_first_step() -> None:
    assert plan.begin() == state("do reserve_inventory")


def test_attempt_only_counts() -> None:
    assert plan.count_attempt(state("do charge_payment", 2)) == state("do charge_payment", 3)


# The runner died before it recorded an outcome; the deadline passed; the customer cancelled; the runner saw that.
LOST, LATE, CANCEL, NEWS = "lost", "late", "cancel", "news"


@dataclass
class Walk:
    """What happened to a saga: its calls and their outcomes, its last state, and whether a cancel was accepted."""

    calls: list[tuple[Call, str]]
    at: SagaState
    cancelled: Reason | None = None


def walk(happenings: list[str]) -> Walk:
    """Apply these events to a saga; after them, every call succeeds.

    The runner sees a cancel at any later time, at the latest when it would confirm the order.
    """
    went = Walk([], plan.begin())
    for happening in [*happenings, *["done"] * (2 * len(Step))]:
        call = plan.decide(went.at)
        if isinstance(call, Finish):
            break  # recorded: a later cancel is refused
        match happening:
            case "cancel":
                went.cancelled = CUSTOMER
            case "late" | "news":
                went.at = plan.interrupt(went.at, cancelled=went.cancelled, late=happening == LATE)
            case _:
                went.calls.append((call, happening))
                went.at = plan.count_attempt(went.at)
                went.at = went.at if happening == LOST else plan.advance(went.at, OUTCOMES[happening])
        if isinstance(plan.decide(went.at), Finish):
            went.at = plan.interrupt(went.at, cancelled=went.cancelled, late=False)
    return went


UNDOABLE = {spec.step for spec in steps.PLANS[steps.NEWEST] if spec.undo is not None}
WALKS = st.lists(st.sampled_from([*OUTCOMES, *["done"] * 8, LOST, LATE, CANCEL, NEWS]), max_size=40).map(walk)


@given(WALKS)
def test_saga_ends_with_all_steps_done_or_all_undone(walked: Walk) -> None:
    calls, at = walked.calls, walked.at
    done = [call.step for call, outcome in calls if call.action is Action.DO and outcome == "done"]
    attempted = list(dict.fromkeys(call.step for call, _ in calls if call.action is Action.DO))
    undone = [call.step for call, outcome in calls if call.action is Action.UNDO and outcome == "done"]
    if plan.decide(at) == Finish(Status.CONFIRMED):
        assert (done, undone, at.reason) == (list(Step), [], None)
    else:
        assert plan.decide(at) == Finish(
            FINAL_STATUSES.get(at.reason, Status.REJECTED) if at.reason else Status.REJECTED
        )
        assert undone == [step for step in reversed(attempted) if step in UNDOABLE]
        assert at.reason is not None


@given(WALKS)
def test_cancelled_saga_is_never_confirmed(walked: Walk) -> None:
    if walked.cancelled:
        assert plan.decide(walked.at) != Finish(Status.CONFIRMED)
    else:
        assert walked.at.reason is not Reason.CANCELLED_BY_CUSTOMER


@given(WALKS)
def test_saga_never_goes_forward_again(walked: Walk) -> None:
    actions = [call.action for call, _ in walked.calls]
    assert actions == sorted(actions)  # every `do` comes before every `undo`


def test_metrics_of_steps_and_reasons_exist_from_the_start() -> None:
    value = Observed().registry.get_sample_value
    for row, action, outcome in product(steps.PLANS[steps.NEWEST], Action, ("done", "refused", "not-sent", "unknown")):
        labels = {"step": row.step, "action": action, "outcome": outcome}
        impossible = action is Action.UNDO and (row.undo is None or outcome == "refused")
        assert value("saga_step_duration_seconds_count", labels) == (None if impossible else 0)
        if not impossible and action is Action.UNDO:
            assert value("saga_compensation_failed_total", {"step": row.step}) == 0
    for reason in Reason:
        status = FINAL_STATUSES.get(reason, Status.REJECTED)
        assert value("orders_finished_total", {"status": status, "reason": reason}) == 0
    assert value("orders_finished_total", {"status": Status.CONFIRMED, "reason": ""}) == 0


def test_a_row_has_an_undo_or_an_earlier_step_that_has_one() -> None:
    """The undo of the step in `compensated_by` runs after the undos of all later steps."""
    for rows_of_plan in steps.PLANS.values():
        for number, spec in enumerate(rows_of_plan):
            undoable = {earlier.step for earlier in rows_of_plan[:number] if earlier.undo is not None}
            assert (spec.undo is None) == (spec.compensated_by in undoable)
    spec = steps.PLANS[steps.NEWEST][0]
    for changes in ({"undo": None}, {"compensated_by": "another"}):
        with pytest.raises(ValueError, match="reserve_inventory"):
            replace(spec, **changes)

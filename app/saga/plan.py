"""The saga's plan as pure functions on its state: what to call next, and what an outcome changes. No I/O and no clock.

Forward, the steps run in order. After an unclear answer the same call is made again, with the same idempotency key. On
a refusal, at the deadline, or when the customer or an operator cancels, the saga compensates: it undoes every step it
ever attempted, in reverse order. That includes a refused step; undoing what never happened succeeds, and it blocks a
call that arrives late. Undoing is retried until it succeeds.

The last step is the point of no return: the transaction that records its success also records the order as confirmed,
unless that transaction finds the order cancelled.
"""

from dataclasses import replace
from enum import StrEnum

from app.orders.model import Reason, Status
from app.partners.ports import Done, NotSent, Outcome, Refused, Unknown
from app.saga.steps import NEWEST, PLANS, Action, Plans, StepSpec
from app.values import immutable


class SagaDirection(StrEnum):
    """The direction of a saga. It changes at most once, from forward to backward."""

    FORWARD = "forward"
    BACKWARD = "backward"


@immutable
class SagaState:
    """Where a saga is: at `step`, which has had `attempts` attempts in this direction. No step means that none is left.

    `reason`: why it compensates.
    """

    plan_version: int
    direction: SagaDirection
    step: str | None
    attempts: int = 0
    reason: Reason | None = None


@immutable
class Call:
    """Ask the step's partner to do or undo it."""

    step: str
    action: Action


@immutable
class Finish:
    """Nothing is left to do: the order takes this status."""

    status: Status


Decision = Call | Finish


def begin(plan_version: int = NEWEST, plans: Plans = PLANS) -> SagaState:
    """Return the state of a saga that has not attempted anything."""
    return SagaState(plan_version, SagaDirection.FORWARD, plans[plan_version][0].step)


def decide(state: SagaState) -> Decision:
    """Return the call to make in this state, or the status that the order ends with."""
    if state.step is not None:
        return Call(state.step, Action.DO if state.direction is SagaDirection.FORWARD else Action.UNDO)
    if state.direction is SagaDirection.FORWARD:
        return Finish(Status.CONFIRMED)
    return Finish(Status.CANCELLED if state.reason is Reason.CANCELLED_BY_CUSTOMER else Status.REJECTED)


def count_attempt(state: SagaState) -> SagaState:
    """Count an attempt of the call. It is recorded before the call; from then on, compensating includes the step."""
    return replace(state, attempts=state.attempts + 1)


def advance(state: SagaState, outcome: Outcome, plans: Plans = PLANS) -> SagaState:
    """Return the state after an outcome of the current call. An unchanged state means: retry the call later."""
    match state.direction, outcome:
        case SagaDirection.FORWARD, Done():
            return _step_forward(state, plans)
        case SagaDirection.BACKWARD, Done():
            return _step_back(state, _index(state, plans) - 1, plans)
        case SagaDirection.FORWARD, Refused(code=code) if code in spec_of(state, plans).refusals:
            return compensate(state, Reason(code), plans)
        case _, Refused() | NotSent() | Unknown():
            return state
    raise AssertionError(f"bug: no rule for {state.direction} and {outcome}")


def compensate(state: SagaState, reason: Reason, plans: Plans = PLANS) -> SagaState:
    """Start compensating: undo all attempted steps, starting with the current one if it was attempted.

    A saga that already compensates does not change. A saga that has done every step does not time out, even if its last
    success is recorded late. A cancel that comes before that record still makes it undo every step.
    """
    if state.direction is SagaDirection.BACKWARD or (state.step is None and reason is Reason.TIMED_OUT):
        return state
    backward = replace(state, direction=SagaDirection.BACKWARD, reason=reason)
    if state.step is None:
        return _step_back(backward, len(plans[state.plan_version]) - 1, plans)
    current = _index(state, plans)
    return _step_back(backward, current if state.attempts else current - 1, plans)


def interrupt(state: SagaState, *, cancelled: Reason | None, late: bool, plans: Plans = PLANS) -> SagaState:
    """Make a forward saga compensate if it was cancelled (for that reason) or is late. A cancel takes precedence.

    Do not call this after the saga's end is recorded: a confirmed order stays confirmed.
    """
    if cancelled is not None:
        state = compensate(state, cancelled, plans)
    return compensate(state, Reason.TIMED_OUT, plans) if late else state


def spec_of(state: SagaState, plans: Plans = PLANS) -> StepSpec:
    """Return the row of the current step."""
    return plans[state.plan_version][_index(state, plans)]


def _step_forward(state: SagaState, plans: Plans) -> SagaState:
    steps, next_index = plans[state.plan_version], _index(state, plans) + 1
    return replace(state, step=steps[next_index].step if next_index < len(steps) else None, attempts=0)


def _step_back(state: SagaState, last: int, plans: Plans) -> SagaState:
    """Go to the latest step, at index `last` or before, that has its own undo."""
    undoable = [spec.step for spec in plans[state.plan_version][: last + 1] if spec.undo is not None]
    return replace(state, step=undoable[-1] if undoable else None, attempts=0)


def _index(state: SagaState, plans: Plans) -> int:
    return [spec.step for spec in plans[state.plan_version]].index(state.step)  # type: ignore[arg-type] # never None here

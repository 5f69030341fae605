"""The saga's plan: a table of steps and pure functions on its state. No I/O, no clock, no chance.

Forward, the steps run in order; an unclear answer means: ask again, with the same idempotency key. On a refusal, at
the deadline, or when the customer or an operator cancels, the saga turns back and undoes every step it ever attempted,
in reverse, the refused one too (the undo of what never happened succeeds and blocks a late arrival). Undoing never
gives up. The last step is the point of no return: the transaction that records its success also records the order as
confirmed, unless that transaction finds the order cancelled.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from app.orders.model import Reason, Status
from app.partners.ports import Done, NotSent, Outcome, Refused, Unknown


class Step(StrEnum):
    """The steps, by the names that partners see in their idempotency keys."""

    RESERVE_INVENTORY = "reserve_inventory"
    CHARGE_PAYMENT = "charge_payment"
    COMMIT_INVENTORY = "commit_inventory"
    CREATE_SHIPMENT = "create_shipment"


class SagaDirection(StrEnum):
    """Which way a saga goes. It turns once, and never forward again."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Action(StrEnum):
    """What is asked of a partner for a step."""

    DO = "do"
    UNDO = "undo"


@dataclass(frozen=True, slots=True)
class Row:
    """A step of the plan. `undone_by_earlier`: an earlier step's undo takes this one back too."""

    step: Step
    refusals: frozenset[Reason]
    undone_by_earlier: bool = False


PLANS: dict[int, tuple[Row, ...]] = {
    1: (
        Row(Step.RESERVE_INVENTORY, frozenset({Reason.OUT_OF_STOCK})),
        Row(Step.CHARGE_PAYMENT, frozenset({Reason.CARD_DECLINED})),
        Row(Step.COMMIT_INVENTORY, frozenset({Reason.HOLD_EXPIRED}), undone_by_earlier=True),
        Row(Step.CREATE_SHIPMENT, frozenset({Reason.UNDELIVERABLE})),
    ),
}
NEWEST = max(PLANS)


@dataclass(frozen=True, slots=True)
class SagaState:
    """Where a saga is: at `step`, which was attempted `attempts` times in this direction; None: nothing is left to do.

    `reason` says why it turned back.
    """

    plan_version: int
    direction: SagaDirection
    step: Step | None
    attempts: int = 0
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Ask the step's partner to do or undo it."""

    step: Step
    action: Action


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do: the order takes this status."""

    status: Status


Decision = Call | Finish


def begin(plan_version: int = NEWEST) -> SagaState:
    """Return the state of a saga that has not attempted anything."""
    return SagaState(plan_version, SagaDirection.FORWARD, PLANS[plan_version][0].step)


def decide(state: SagaState) -> Decision:
    """Return what the state asks for."""
    if state.step is not None:
        return Call(state.step, Action.DO if state.direction is SagaDirection.FORWARD else Action.UNDO)
    if state.direction is SagaDirection.FORWARD:
        return Finish(Status.CONFIRMED)
    return Finish(Status.CANCELLED if state.reason is Reason.CANCELLED_BY_CUSTOMER else Status.REJECTED)


def attempted(state: SagaState) -> SagaState:
    """Record that the call is about to be made: from here on it must be undone if the saga turns back."""
    return replace(state, attempts=state.attempts + 1)


def advance(state: SagaState, outcome: Outcome) -> SagaState:
    """Return the state after an outcome of the present call; the same state means: the same call again, later."""
    match state.direction, outcome:
        case SagaDirection.FORWARD, Done():
            return _step_forward(state)
        case SagaDirection.BACKWARD, Done():
            return _step_back(state, _index(state) - 1)
        case SagaDirection.FORWARD, Refused(code=code) if code in _row(state).refusals:
            return compensate(state, Reason(code))
        case _, Refused() | NotSent() | Unknown():
            return state
    raise AssertionError(f"bug: no rule for {state.direction} and {outcome}")


def compensate(state: SagaState, reason: Reason) -> SagaState:
    """Turn a forward saga: undo what was attempted, beginning with the present step if it was.

    A saga that has turned stays as it is. One that has done every step was in time, however late that is recorded; a
    cancel that comes before the record still turns it, and all of it is undone.
    """
    if state.direction is SagaDirection.BACKWARD or (state.step is None and reason is Reason.TIMED_OUT):
        return state
    turned = replace(state, direction=SagaDirection.BACKWARD, reason=reason)
    if state.step is None:
        return _step_back(turned, len(PLANS[state.plan_version]) - 1)
    return _step_back(turned, _index(state) if state.attempts else _index(state) - 1)


def interrupt(state: SagaState, *, cancelled: Reason | None, late: bool) -> SagaState:
    """Turn a forward saga back that was cancelled (by whom, the reason says) or is late; a cancel comes first.

    Not to be asked once the end is on record: a confirmed order stays confirmed.
    """
    if cancelled is not None:
        state = compensate(state, cancelled)
    return compensate(state, Reason.TIMED_OUT) if late else state


def _step_forward(state: SagaState) -> SagaState:
    rows, following = PLANS[state.plan_version], _index(state) + 1
    return replace(state, step=rows[following].step if following < len(rows) else None, attempts=0)


def _step_back(state: SagaState, last: int) -> SagaState:
    """Go to the latest step, at index `last` or before, that has an undo of its own."""
    undone = [row.step for row in PLANS[state.plan_version][: last + 1] if not row.undone_by_earlier]
    return replace(state, step=undone[-1] if undone else None, attempts=0)


def _row(state: SagaState) -> Row:
    return PLANS[state.plan_version][_index(state)]


def _index(state: SagaState) -> int:
    return [row.step for row in PLANS[state.plan_version]].index(state.step)  # type: ignore[arg-type] # never None here

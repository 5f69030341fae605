"""What tests sweep over, from the plan of new sagas and from the sandbox: partner calls and crash points."""

import importlib
import pkgutil
from collections.abc import Sequence

import sandbox
from app.saga.steps import NEWEST, PLANS, Action, StepSpec
from sandbox.calls import Operation

PLAN = PLANS[NEWEST]
INSTANTS = ("attempted", "answered")

# The sandbox names its operations; their idempotency keys end with the step, or with `step:undo`.
_OPERATIONS = {
    operation.key_ending: operation.name
    for module in pkgutil.iter_modules(sandbox.__path__)
    for operation in vars(importlib.import_module(f"sandbox.{module.name}")).values()
    if isinstance(operation, Operation)
}
OPERATIONS = {
    (spec.step, action): _OPERATIONS[spec.step if action is Action.DO else f"{spec.step}:undo"]
    for spec in PLAN
    for action in spec.calls()
}
DO = tuple(OPERATIONS[spec.step, Action.DO] for spec in PLAN)
UNDO = tuple(OPERATIONS[spec.step, Action.UNDO] for spec in reversed(PLAN) if spec.undo is not None)


def undo_of(operation: str) -> str | None:
    """Return the undo of the step with this do; None if the undo of an earlier step reverses it too."""
    spec = PLAN[DO.index(operation)]
    return OPERATIONS.get((spec.step, Action.UNDO))


def crash_points(action: Action, plan: Sequence[StepSpec] = PLAN) -> list[str]:
    """Return the crash points of a plan's do's in the order of the steps, or of its undos in reverse order."""
    steps = plan if action is Action.DO else tuple(reversed(plan))
    return [f"saga.{spec.step}.{action}.{instant}" for spec in steps if action in spec.calls() for instant in INSTANTS]


FORWARD = crash_points(Action.DO)
BACKWARD = crash_points(Action.UNDO)

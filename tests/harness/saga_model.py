"""A model of the saga's environment without I/O: partners as agreed, rows with fencing tokens, runners that die.

The partners keep their keys and tombstones forever, as the contract says. A request in transit may arrive at any later
time, more than once. The runners do what `saga.runner` does, write by write.
"""

from dataclasses import dataclass, field

from app.orders.model import Reason, Status
from app.partners.ports import Done, Outcome, Refused, Unknown
from app.saga import plan
from app.saga.plan import Call, Finish, SagaDirection, SagaState
from app.saga.steps import NEWEST, PLANS, Action, Step

STOCK = 5
HOLD, COMMIT, RELEASE = (
    Call(Step.RESERVE_INVENTORY, Action.DO),
    Call(Step.COMMIT_INVENTORY, Action.DO),
    Call(Step.RESERVE_INVENTORY, Action.UNDO),
)
CHARGE, REFUND = Call(Step.CHARGE_PAYMENT, Action.DO), Call(Step.CHARGE_PAYMENT, Action.UNDO)
CREATE, RECALL = Call(Step.CREATE_SHIPMENT, Action.DO), Call(Step.CREATE_SHIPMENT, Action.UNDO)
UNDONE_BY = {Call(spec.step, Action.DO): Call(spec.compensated_by or spec.step, Action.UNDO) for spec in PLANS[NEWEST]}


def cancel_reason(requested: bool) -> Reason | None:
    """Return the reason for which the saga compensates."""
    return Reason.CANCELLED_BY_CUSTOMER if requested else None


@dataclass
class Standing:
    """What the partners store about one saga. `hold`: None, held, sold, returned or expired."""

    quantity: int
    hold_seconds: int
    card_is_good: bool
    deliverable: bool
    hold: str | None = None
    hold_ends_at: int = 0
    charges: int = 0
    refunds: int = 0
    parcels: int = 0
    answers: dict[Call, Outcome] = field(default_factory=dict)


class Partners:
    """Inventory, payment and shipping. Money and parcels are counted in orders: 1 is the total amount, or all items."""

    def __init__(self) -> None:
        self.now = 0
        self.sagas: dict[int, Standing] = {}

    def holding(self, state: str) -> int:
        """Return how many units are in this state, `held` or `sold`."""
        return sum(saga.quantity for saga in self.sagas.values() if saga.hold == state)

    def pass_time(self, seconds: int) -> None:
        """Let time pass, and expire holds."""
        self.now += seconds
        for saga in self.sagas.values():
            if saga.hold == "held" and saga.hold_ends_at <= self.now:
                saga.hold = "expired"

    def deliver(self, number: int, call: Call) -> Outcome:
        """Decide a call, or repeat its decision. A do after its undo gets `undone`, which is not a refusal."""
        saga = self.sagas[number]
        if call in UNDONE_BY and UNDONE_BY[call] in saga.answers:
            return Unknown("409 undone")
        if call not in saga.answers:
            outcome = self._decide(saga, call)
            if isinstance(outcome, Unknown):
                return outcome
            saga.answers[call] = outcome
        return saga.answers[call]

    def _decide(self, saga: Standing, call: Call) -> Outcome:
        if call == COMMIT and saga.hold is None:
            return Unknown("404 no-hold")
        if (reason := self._refusal(saga, call)) is not None:
            return Refused(reason)
        if call == HOLD:
            saga.hold, saga.hold_ends_at = "held", self.now + saga.hold_seconds
        elif call == COMMIT:
            saga.hold = "sold"
        elif call == RELEASE:
            saga.hold = "returned" if saga.hold in {"held", "sold"} else saga.hold
        elif call == CHARGE:
            saga.charges += 1
        elif call == REFUND:
            saga.refunds = saga.charges
        else:
            if call == CREATE:
                assert (saga.hold, saga.charges - saga.refunds) == ("sold", 1), f"not sold and paid for: {saga}"
            saga.parcels = int(call == CREATE)
        return Done()

    def _refusal(self, saga: Standing, call: Call) -> Reason | None:
        refused = {
            HOLD: (self.holding("held") + self.holding("sold") + saga.quantity > STOCK, Reason.OUT_OF_STOCK),
            COMMIT: (saga.hold == "expired", Reason.HOLD_EXPIRED),
            CHARGE: (not saga.card_is_good, Reason.CARD_DECLINED),
            CREATE: (not saga.deliverable, Reason.UNDELIVERABLE),
        }
        is_refused, reason = refused.get(call, (False, None))
        return reason if is_refused else None


@dataclass
class Rows:
    """The rows of an order whose saga has started. Each read or write is one transaction."""

    deadline_at: int
    status: Status = Status.PENDING
    cancel_requested: bool = False
    version: int = 0
    state: SagaState = field(default_factory=plan.begin)

    @property
    def ended(self) -> bool:
        """Return whether the order's status is final."""
        return self.status in {Status.CONFIRMED, Status.REJECTED, Status.CANCELLED}

    def cancel(self) -> bool:
        """Cancel the order as a customer. Return false if it is too late."""
        if self.status in {Status.CONFIRMED, Status.REJECTED}:
            return False
        self.cancel_requested = True
        return True


class Runner:
    """One process that has claimed one saga. `asks`: the call whose outcome it waits for."""

    def __init__(self, rows: Rows, number: int) -> None:
        rows.version += 1
        self.number = number
        self.asks: Call | None = None
        self._rows, self._version, self._state = rows, rows.version, rows.state
        self._cancelled = rows.cancel_requested

    def begin(self, now: int) -> None:
        """Record the first attempt."""
        self._record(self._state, now)

    def hear(self, outcome: Outcome, now: int) -> None:
        """Record the outcome of the call, and the next attempt."""
        assert self.asks is not None
        self._record(plan.advance(self._state, outcome), now)

    def _record(self, reached: SagaState, now: int) -> None:
        self.asks, late = None, now >= self._rows.deadline_at
        if self._version != self._rows.version:
            return  # another process has claimed it: the write changes nothing
        state = plan.interrupt(reached, cancelled=cancel_reason(self._cancelled), late=late)
        decision = plan.decide(state)
        if state.direction is not self._rows.state.direction or isinstance(decision, Finish):
            state = plan.interrupt(
                reached, cancelled=cancel_reason(self._rows.cancel_requested), late=late
            )  # the order is locked
            decision = plan.decide(state)
            if state.direction is not self._rows.state.direction:
                self._rows.status = Status.COMPENSATING
            if isinstance(decision, Finish):
                self._rows.status = decision.status
        self._state = plan.count_attempt(state) if isinstance(decision, Call) else state
        self._rows.state, self._cancelled = self._state, self._rows.cancel_requested
        self._rows.version = self._version = self._version + 1
        if isinstance(decision, Call):
            assert not late or decision.action is Action.UNDO, f"asked for more after the deadline: {decision}"
            if self._cancelled and state.direction is SagaDirection.FORWARD:
                self._record(self._state, now)  # the write returned the cancel: make no further do
            else:
                self.asks = decision

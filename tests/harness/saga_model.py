"""A model of what the saga lives among, without I/O: partners as agreed, the rows with their fence, runners that die.

The partners keep their keys and tombstones for ever, as the contract says; a request that is on its way may arrive at
any later instant, more than once. The runners do what the orchestrator does, write by write.
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


def who(asked: bool) -> Reason | None:
    """Return whose word it is that the saga turns back."""
    return Reason.CANCELLED_BY_CUSTOMER if asked else None


@dataclass
class Standing:
    """What the partners have of one saga. `hold`: None, held, sold, returned or expired."""

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
    """Inventory, payment and shipping. Money and parcels are counted in orders: one is the total, or all of it."""

    def __init__(self) -> None:
        self.now = 0
        self.sagas: dict[int, Standing] = {}

    def holding(self, state: str) -> int:
        """How many units are `held` or `sold`."""
        return sum(saga.quantity for saga in self.sagas.values() if saga.hold == state)

    def pass_time(self, seconds: int) -> None:
        """Let holds run out."""
        self.now += seconds
        for saga in self.sagas.values():
            if saga.hold == "held" and saga.hold_ends_at <= self.now:
                saga.hold = "expired"

    def deliver(self, number: int, call: Call) -> Outcome:
        """Decide a call, or repeat what was decided; a do after its undo is undone, which is no refusal."""
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
    """What the database has of an order whose saga has started; a look or a write is one transaction."""

    deadline_at: int
    status: Status = Status.PENDING
    cancel_requested: bool = False
    version: int = 0
    state: SagaState = field(default_factory=plan.begin)

    @property
    def ended(self) -> bool:
        """Whether the order has its last status."""
        return self.status in {Status.CONFIRMED, Status.REJECTED, Status.CANCELLED}

    def cancel(self) -> bool:
        """Cancel the order as a customer; false where it is too late."""
        if self.status in {Status.CONFIRMED, Status.REJECTED}:
            return False
        self.cancel_requested = True
        return True


class Runner:
    """One process that has taken one saga on, as the orchestrator drives it. `asks`: the call it waits for."""

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
        """Record what the call came to, and the next attempt."""
        assert self.asks is not None
        self._record(plan.advance(self._state, outcome), now)

    def _record(self, reached: SagaState, now: int) -> None:
        self.asks, late = None, now >= self._rows.deadline_at
        if self._version != self._rows.version:
            return  # taken over: the write changes nothing
        state = plan.interrupt(reached, cancelled=who(self._cancelled), late=late)
        decision = plan.decide(state)
        if state.direction is not self._rows.state.direction or isinstance(decision, Finish):
            state = plan.interrupt(
                reached, cancelled=who(self._rows.cancel_requested), late=late
            )  # the order is locked
            decision = plan.decide(state)
            if state.direction is not self._rows.state.direction:
                self._rows.status = Status.COMPENSATING
            if isinstance(decision, Finish):
                self._rows.status = decision.status
        self._state = plan.attempted(state) if isinstance(decision, Call) else state
        self._rows.state, self._cancelled = self._state, self._rows.cancel_requested
        self._rows.version = self._version = self._version + 1
        if isinstance(decision, Call):
            assert not late or decision.action is Action.UNDO, f"asked for more after the deadline: {decision}"
            if self._cancelled and state.direction is SagaDirection.FORWARD:
                self._record(self._state, now)  # news of the cancel came with the write: nothing more is asked for
            else:
                self.asks = decision

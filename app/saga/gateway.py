"""What the saga asks of its partners: each call of the plan at its port, measured, logged, and behind a circuit.

A partner has a circuit for doing and one for undoing, and of each a second one for calls that come again. With one, a
thousand refunds that fail would keep new charges from being tried until their orders are late, although the partner
takes charges well; and so would the few orders that it fails for good, which come back again and again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import structlog

from app.loops import full_jitter
from app.observability.signals import Signals
from app.orders.model import Order, Reason
from app.partners.circuit import Circuit, CircuitState, Permit, is_failure
from app.partners.ports import (
    PARTNERS,
    ChargeRequest,
    Done,
    Inventory,
    NotSent,
    Outcome,
    PartnerItem,
    Payment,
    Refused,
    Shipping,
    Unknown,
)
from app.saga.facts import HoldExpired, PartnerCalled
from app.saga.plan import Action, Call, Step
from app.saga.store import Saga

log = structlog.get_logger(__name__)

PARTNER_OF = {
    Step.RESERVE_INVENTORY: "inventory",
    Step.CHARGE_PAYMENT: "payment",
    Step.COMMIT_INVENTORY: "inventory",
    Step.CREATE_SHIPMENT: "shipping",
}


FIRST, AGAIN = False, True
VISITS_PER_SECOND = 100.0  # of sagas that wait for a circuit: each costs the database a claim and a transaction


@dataclass(frozen=True, slots=True)
class CircuitConfig:
    """A circuit opens for `open_seconds` after `failures` in a row."""

    failures: int
    open_seconds: float


class PartnerGateway:
    """Calls the three partners for this process, each behind its circuits."""

    def __init__(
        self,
        inventory: Inventory,
        payment: Payment,
        shipping: Shipping,
        config: CircuitConfig,
        signals: Signals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inventory = inventory
        self._payment = payment
        self._shipping = shipping
        self._signals = signals
        self._open_seconds = config.open_seconds
        self._clock = clock
        self._last_visit = clock()  # that was given to one who waits
        self._circuits = {
            key: Circuit(config.failures, config.open_seconds, clock)
            for key in product(PARTNERS, Action, (FIRST, AGAIN))
        }

    def admit(self, call: Call, attempts: int) -> Permit | float:
        """Return a permit for the call, which has had so many attempts; or in how many seconds to ask again.

        Waiting sagas are spread out so that they cannot overload Postgres, no matter how many there are.
        """
        admitted = self._circuit(call, again=attempts > 0).admit()
        if isinstance(admitted, Permit):
            return admitted
        now = self._clock()
        self._last_visit = max(now + admitted, self._last_visit + 1 / VISITS_PER_SECOND)
        return self._last_visit - now + full_jitter(1, self._open_seconds, self._open_seconds)

    async def call(self, call: Call, permit: Permit, order: Order, saga: Saga) -> Outcome:
        """Make one call whose attempt is on record, and release its permit."""
        started_at = time.perf_counter()
        with permit:
            try:
                outcome = await self._ask(call, order, saga)
                self._record_outcome(call, saga.state.attempts > 1, permit, outcome)
            except Exception as error:  # the attempt is on record and needs an outcome, whatever broke
                log.exception("partner.defect", step=call.step, action=call.action)
                outcome = Unknown(f"defect: {type(error).__name__}", our_fault=True)
        seconds = time.perf_counter() - started_at
        self._signals.emit(PartnerCalled(call.step, call.action, label(outcome), seconds))
        if not isinstance(outcome, Done):
            self._log(call, saga.state.attempts, outcome)
        return outcome

    async def _ask(self, call: Call, order: Order, saga: Saga) -> Outcome:
        items = [PartnerItem(line.sku, line.quantity) for line in order.lines]
        charge = ChargeRequest(
            order.id, order.total_minor, order.currency, order.payment_method, saga.started_at, saga.payment_id
        )
        match call.step, call.action:
            case Step.RESERVE_INVENTORY, Action.DO:
                return await self._inventory.hold(order.id, items, saga.hold_seconds)
            case Step.CHARGE_PAYMENT, Action.DO:
                return await self._payment.charge(charge)
            case Step.COMMIT_INVENTORY, Action.DO:
                return await self._inventory.commit(order.id)
            case Step.CREATE_SHIPMENT, Action.DO:
                return await self._shipping.create(order.id, items, order.shipping_address)
            case Step.CREATE_SHIPMENT, Action.UNDO:
                return await self._shipping.cancel(order.id)
            case Step.CHARGE_PAYMENT, Action.UNDO:
                return await self._payment.refund(charge)
            case Step.RESERVE_INVENTORY, Action.UNDO:
                return await self._inventory.release(order.id)
        raise AssertionError(f"bug: nobody to ask for {call}")

    def _record_outcome(self, call: Call, again: bool, permit: Permit, outcome: Outcome) -> None:
        """Count a failure for the call's own circuit; a success closes both, because the partner answers."""
        pair = {repeated: self._circuit(call, again=repeated) for repeated in (FIRST, AGAIN)}
        before = {repeated: circuit.state for repeated, circuit in pair.items()}
        permit.record(outcome)
        if not is_failure(outcome):
            pair[not again].close()
        for repeated, circuit in pair.items():
            if circuit.state is not before[repeated]:
                log.warning(
                    "partner.circuit",
                    partner=PARTNER_OF[call.step],
                    action=call.action,
                    again=repeated,
                    state=circuit.state.name.lower(),
                )

    def _log(self, call: Call, attempt: int, outcome: Outcome) -> None:
        if outcome == Refused(Reason.HOLD_EXPIRED):
            self._signals.emit(HoldExpired())
        alarming = isinstance(outcome, Unknown) and outcome.alarming
        (log.error if alarming else log.info)(
            "saga.step",
            step=call.step,
            action=call.action,
            attempt=attempt,
            outcome=label(outcome),
            detail=detail(outcome),
        )

    def _circuit(self, call: Call, *, again: bool) -> Circuit:
        return self._circuits[PARTNER_OF[call.step], call.action, again]

    def circuit_state(self, partner: str) -> CircuitState:
        """Return the state of the most open of the partner's circuits."""
        return max(circuit.state for (name, _, _), circuit in self._circuits.items() if name == partner)


def label(outcome: Outcome) -> str:
    """Name the outcome, as log and metrics do."""
    match outcome:
        case Done():
            return "done"
        case Refused():
            return "refused"
        case NotSent():
            return "not-sent"
        case Unknown():
            return "unknown"


def detail(outcome: Outcome) -> str | None:
    """Say what there is to say of an outcome, for people."""
    match outcome:
        case Done():
            return None
        case Refused(code=code):
            return code
        case NotSent(detail=detail) | Unknown(detail=detail):
            return detail

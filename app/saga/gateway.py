"""Make the calls of the plan's steps to the partners' ports: measured, logged, and each behind a circuit.

A partner has separate circuits for dos and undos, and for first calls and retries. With a single circuit, a thousand
failing refunds would block new charges until their orders are late, even if the partner accepts charges. The retries of
a few orders that the partner always fails would do the same.

An operator may pause a partner (see `saga.pauses`): then none of its calls is admitted, whatever its circuits say.
"""

import time
from collections.abc import Callable
from itertools import product

import structlog
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from app.loops import full_jitter
from app.observability.signals import Signals
from app.orders.model import Order, Reason
from app.partners.circuit import Circuit, CircuitState, Permit, is_failure
from app.partners.ports import Done, NotSent, Outcome, PartnerPorts, Refused, Unknown
from app.saga import plan
from app.saga.facts import HoldExpired, PartnerCalled
from app.saga.pauses import PartnerPauses
from app.saga.plan import Call, SagaState
from app.saga.steps import PLANS, Action, Plans, StepRequest, StepSpec, partners
from app.values import immutable

log = structlog.get_logger(__name__)

FIRST, RETRY = False, True
# The maximum, for sagas that wait for a circuit or for the end of a pause: each visit costs a claim and a transaction.
VISITS_PER_SECOND = 100.0
LOOK_AGAIN_SECONDS = 60.0  # after this time, a saga that waits for the end of a pause looks whether it is over


@immutable
class CircuitConfig:
    """A circuit opens for `open_seconds` after `failures` failed calls in a row."""

    failures: int
    open_seconds: float


@immutable
class Denial:
    """The partner must not be called now: ask again after `seconds`. `paused`: because an operator paused it."""

    seconds: float
    paused: bool = False


class PartnerGateway:
    """Calls the partners of the plans for this process, each behind its circuits."""

    def __init__(
        self,
        ports: PartnerPorts,
        config: CircuitConfig,
        signals: Signals,
        plans: Plans = PLANS,
        clock: Callable[[], float] = time.monotonic,
        pauses: PartnerPauses | None = None,
    ) -> None:
        self._ports = ports
        self._signals = signals
        self._plans = plans
        self._open_seconds = config.open_seconds
        self._clock = clock
        self._last_visit = clock()  # the latest visit that a saga was given that waits for a circuit
        self.pauses = pauses or PartnerPauses(known=True)
        self._last_paused_visit = clock()  # the same, of those that wait for the end of a pause
        self._circuits = {
            key: Circuit(config.failures, config.open_seconds, clock)
            for key in product(partners(plans), Action, (FIRST, RETRY))
        }

    def admit(self, state: SagaState) -> Permit | Denial:
        """Return a permit for the current call of the saga, or when it should ask again.

        Waiting sagas are spread out so that they cannot overload Postgres, no matter how many there are.
        """
        spec, action = self._call_of(state)
        if (paused_seconds := self.pauses.remaining_seconds(spec.partner)) is not None:
            return self._deny_paused(paused_seconds)
        admitted = self._circuits[spec.partner, action, state.attempts > 0].admit()
        if isinstance(admitted, Permit):
            return admitted
        now = self._clock()
        self._last_visit = max(now + admitted, self._last_visit + 1 / VISITS_PER_SECOND)
        return Denial(self._last_visit - now + full_jitter(1, self._open_seconds, self._open_seconds))

    def _deny_paused(self, paused_seconds: float) -> Denial:
        """Let the saga look again at the end of the pause, or before: an operator may end the pause early."""
        now = self._clock()
        wait = min(paused_seconds, LOOK_AGAIN_SECONDS)
        self._last_paused_visit = max(now + wait, self._last_paused_visit + 1 / VISITS_PER_SECOND)
        return Denial(min(paused_seconds, self._last_paused_visit - now), paused=True)

    async def call(self, state: SagaState, permit: Permit, request: StepRequest) -> Outcome:
        """Make the current call of the saga, whose attempt has been recorded, and release the permit."""
        spec, action = self._call_of(state)
        started_at = time.perf_counter()
        with (
            permit,
            self._signals.span(
                f"{spec.step} {action}", attributes=step_attributes(spec, action, state, request.order)
            ) as span,
        ):
            try:
                outcome = await spec.calls()[action](self._ports, request)
                self._record_outcome(spec.partner, action, state.attempts > 1, permit, outcome)
            except Exception as error:  # a recorded attempt needs an outcome, even after a defect
                log.exception("partner.defect", step=spec.step, action=action)
                outcome = Unknown(f"defect: {type(error).__name__}", our_fault=True)
            _describe_outcome(span, outcome)
        seconds = time.perf_counter() - started_at
        self._signals.emit(PartnerCalled(spec.step, action, label(outcome), seconds))
        if not isinstance(outcome, Done):
            self._log(Call(spec.step, action), state.attempts, outcome)
        return outcome

    def _call_of(self, state: SagaState) -> tuple[StepSpec, Action]:
        call = plan.decide(state)
        assert isinstance(call, Call)  # noqa: S101 - bug: a saga that has ended makes no call
        return plan.spec_of(state, self._plans), call.action

    def _record_outcome(self, partner: str, action: Action, again: bool, permit: Permit, outcome: Outcome) -> None:
        """Count a failure for the call's own circuit. A success closes both circuits, because the partner answers."""
        pair = {repeated: self._circuits[partner, action, repeated] for repeated in (FIRST, RETRY)}
        before = {repeated: circuit.state for repeated, circuit in pair.items()}
        permit.record(outcome)
        if not is_failure(outcome):
            pair[not again].close()
        for repeated, circuit in pair.items():
            if circuit.state is not before[repeated]:
                state = circuit.state.name.lower()
                log.warning("partner.circuit", partner=partner, action=action, again=repeated, state=state)

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

    def circuit_state(self, partner: str) -> CircuitState:
        """Return the state of the partner's circuit that is most open."""
        return max(circuit.state for (name, _, _), circuit in self._circuits.items() if name == partner)


def step_attributes(spec: StepSpec, action: Action, state: SagaState, order: Order) -> dict[str, AttributeValue]:
    """Return the attributes of the span of one attempt."""
    return {
        "orders.order_id": str(order.id),
        "orders.tenant": order.tenant,
        "orders.step": spec.step,
        "orders.action": action,
        "orders.attempt": state.attempts,
        "orders.partner": spec.partner,
        "orders.replayed": state.attempts > 1,
    }


def _describe_outcome(span: Span, outcome: Outcome) -> None:
    """Record the outcome on the span. A refusal is an error, too: it ends the order."""
    span.set_attribute("orders.outcome", label(outcome))
    if not isinstance(outcome, Done):
        span.set_attribute("error.type", label(outcome))
        span.set_status(Status(StatusCode.ERROR, detail(outcome)))


def label(outcome: Outcome) -> str:
    """Return the name of the outcome in the log and in metrics."""
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
    """Return what the partner or the client reported about the outcome; None if it succeeded."""
    match outcome:
        case Done():
            return None
        case Refused(code=code):
            return code
        case NotSent(detail=detail) | Unknown(detail=detail):
            return detail

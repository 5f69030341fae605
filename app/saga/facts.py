"""Facts about sagas, and their metrics."""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from uuid import UUID

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.observability.exemplars import current_exemplar
from app.observability.signals import Fact, Signals
from app.orders.model import UNFINISHED, Status
from app.partners.ports import OUTCOMES
from app.saga.steps import PLANS, Action, Plans, partners, specs
from app.values import immutable

CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SAGA_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@immutable
class PartnerCalled(Fact):
    """A partner call has ended. `seconds`: how long it took."""

    step: str
    action: Action
    outcome: str
    seconds: float


@immutable
class HoldExpired(Fact):
    """A saga starts compensating because its stock was no longer held."""


@immutable
class SagaFinished(Fact):
    """A saga has ended, and its end is committed. `seconds`: the time since its start."""

    level = "info"
    event = "saga.finished"
    status: Status
    reason: str | None
    seconds: float


@immutable
class SagaWentWrong(Fact):
    """A saga has compensated, needs an operator, or has ended after its deadline."""

    order_id: UUID


@immutable
class SagaDue(Fact):
    """Sagas may be due: an operator changed one, or the pause of a partner has ended."""


@immutable
class PartnerPauseChanged(Fact):
    """An operator paused or resumed a partner."""


@immutable
class SagasMeasured(Fact):
    """Unfinished sagas: how many by their order's status, the age of the oldest, how many need an operator."""

    in_flight: Mapping[str, int]
    oldest_age_seconds: float
    needs_operator: int


def install_metrics(signals: Signals, registry: CollectorRegistry, plans: Plans = PLANS) -> None:
    """Create the metrics, with every series of these plans at zero, and subscribe them to the facts."""
    in_flight = Gauge("saga_in_flight", "Unfinished sagas, by their order's status", ["status"], registry=registry)
    for status in UNFINISHED:
        in_flight.labels(status)
    oldest_age = Gauge("saga_oldest_unfinished_age_seconds", "Age of the oldest unfinished saga", registry=registry)
    needs_operator = Gauge(
        "saga_needs_operator",
        "Unfinished sagas with an undo that keeps failing, or a call that retrying cannot fix",
        registry=registry,
    )
    duration = Histogram("saga_duration_seconds", "Start of a saga to its end", buckets=SAGA_SECONDS, registry=registry)

    def set_gauges(fact: SagasMeasured) -> None:
        for status in UNFINISHED:
            in_flight.labels(status).set(fact.in_flight.get(status, 0))
        oldest_age.set(fact.oldest_age_seconds)
        needs_operator.set(fact.needs_operator)

    signals.subscribe(SagasMeasured, set_gauges)
    signals.subscribe(SagaFinished, lambda fact: duration.observe(fact.seconds, current_exemplar()))
    _install_calls(signals, registry, plans)


def _install_calls(signals: Signals, registry: CollectorRegistry, plans: Plans) -> None:
    call_duration = Histogram(
        "saga_step_duration_seconds",
        "One call to a partner",
        ["step", "action", "outcome"],
        buckets=CALL_SECONDS,
        registry=registry,
    )
    holds_expired = Counter(
        "inventory_holds_expired",
        "Sagas that started compensating because their stock was no longer held",
        registry=registry,
    )
    compensation_failed = Counter(
        "saga_compensation_failed", "Failed attempts to undo a step", ["step"], registry=registry
    )
    calls = functools.cache(call_duration.labels)  # the library's own look-up takes 3 µs
    for spec in specs(plans):
        for action, outcome in product(spec.calls(), OUTCOMES):
            if action is Action.DO or outcome != "refused":
                calls(spec.step, action, outcome)
        if spec.undo is not None:
            compensation_failed.labels(spec.step)

    def observe_call(fact: PartnerCalled) -> None:
        calls(fact.step, fact.action, fact.outcome).observe(fact.seconds, current_exemplar())
        if fact.action is Action.UNDO and fact.outcome != "done":
            compensation_failed.labels(fact.step).inc()

    signals.subscribe(PartnerCalled, observe_call)
    signals.subscribe(HoldExpired, lambda _: holds_expired.inc())


def watch_circuits(registry: CollectorRegistry, state: Callable[[str], int] | None, plans: Plans = PLANS) -> None:
    """Export the state of each partner's circuit. `state` is None if this process calls no partner."""
    gauge = Gauge(
        "partner_circuit_state",
        "Whether this process pauses calls to a partner: 0 closed, 1 half-open, 2 open",
        ["partner"],
        registry=registry,
    )
    for partner in partners(plans):
        series = gauge.labels(partner)
        if state is not None:
            series.set_function(partial(state, partner))


def watch_pauses(registry: CollectorRegistry, is_paused: Callable[[str], bool] | None, plans: Plans = PLANS) -> None:
    """Export whether each partner is paused. `is_paused` is None if this process calls no partner."""
    gauge = Gauge(
        "partner_paused", "Whether an operator has paused calls to a partner: 0 or 1", ["partner"], registry=registry
    )
    for partner in partners(plans):
        series = gauge.labels(partner)
        if is_paused is not None:
            series.set_function(partial(is_paused, partner))

"""Create every metric of a process, with each series at zero."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics

from app.api import facts as api_facts
from app.bootstrap.consumers import queues
from app.idempotency import facts as idempotency_facts
from app.messaging import facts as messaging_facts
from app.messaging.topology import QueueSpec
from app.observability import facts as loop_facts
from app.observability.logs import LOG_LINES_DROPPED
from app.observability.signals import Signals
from app.observability.tracing import SPANS_DROPPED
from app.operations import facts as operation_facts
from app.operations.maintenance import facts as maintenance_facts
from app.operations.maintenance import pruner
from app.orders import facts as order_facts
from app.saga import facts as saga_facts
from app.saga.steps import PLANS, Plans


def install(signals: Signals, specs: Sequence[QueueSpec] = queues(), plans: Plans = PLANS) -> CollectorRegistry:
    """Create the metrics in a registry of their own, and subscribe them to `signals`."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # these are a second, unused series per metric
    registry = CollectorRegistry()
    api_facts.install_metrics(signals, registry)
    order_facts.install_metrics(signals, registry)
    idempotency_facts.install_metrics(signals, registry)
    messaging_facts.install_metrics(signals, registry, [spec.name for spec in specs])
    saga_facts.install_metrics(signals, registry, plans)
    maintenance_facts.install_metrics(signals, registry, pruner.TABLES)
    operation_facts.install_metrics(signals, registry)
    loop_facts.install_metrics(signals, registry)
    registry.register(LOG_LINES_DROPPED)
    registry.register(SPANS_DROPPED)
    return registry


def install_gauges(
    registry: CollectorRegistry,
    circuit_state: Callable[[str], int] | None,
    connections_in_use: Callable[[], int],
    streams: Callable[[], int] = lambda: 0,
    is_paused: Callable[[str], bool] | None = None,
) -> None:
    """Create the gauges that read the state of a component when they are shown."""
    saga_facts.watch_circuits(registry, circuit_state)
    saga_facts.watch_pauses(registry, is_paused)
    Gauge("db_pool_in_use", "Connections lent out", registry=registry).set_function(connections_in_use)
    Gauge("event_streams_open", "Event streams of orders", registry=registry).set_function(streams)


def read_answers(registry: CollectorRegistry) -> list[tuple[float, float]]:
    """Return the histogram of 201 answers to orders: upper bounds in seconds, and how many were not above each."""
    wanted = {"method": "POST", "route": "/orders", "status": "201"}
    name = f"{api_facts.REQUEST_DURATION}_bucket"
    samples = (sample for metric in registry.restricted_registry([name]).collect() for sample in metric.samples)
    return [(float(sample.labels["le"]), sample.value) for sample in samples if wanted.items() <= sample.labels.items()]

"""Metrics of one process. Labels are of low cardinality: never an order id, never a key."""

import itertools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from app.observability.logs import LOG_LINES_DROPPED

LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# What orders and sagas can come to, named here so that each series is there from the start.
REJECTIONS = ("out-of-stock", "card-declined", "undeliverable", "hold-expired", "timed-out", "compensated-by-operator")
CANCELS = ("cancelled-by-customer", "compensated-by-operator")
ENDS = (
    ("confirmed", ""),
    *(("rejected", reason) for reason in REJECTIONS),
    *(("cancelled", reason) for reason in CANCELS),
)
STEPS = {
    "do": ("reserve_inventory", "charge_payment", "commit_inventory", "create_shipment"),
    "undo": ("create_shipment", "charge_payment", "reserve_inventory"),
}
OUTCOMES = {"do": ("done", "refused", "not-sent", "unknown"), "undo": ("done", "not-sent", "unknown")}
PARTNERS = ("inventory", "payment", "shipping")
QUEUE = "orders.saga"
PRUNED_TABLES = ("outbox", "inbox", "sagas", "idempotency_keys")
SAGA_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Metrics:
    """Every metric of a process, in a registry of its own; each is there from the start, if only at zero."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of no use to anybody
        self.registry = registry = CollectorRegistry()
        self.http_duration = Histogram(
            "http_server_request_duration_seconds",
            "Time from the request's head to the last byte of the answer",
            ["method", "route", "status"],
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.orders_placed = Counter("orders_placed", "Orders accepted", registry=registry)
        self.orders_finished = Counter(
            "orders_finished", "Orders that came to an end here", ["status", "reason"], registry=registry
        )
        for status, reason in ENDS:
            self.orders_finished.labels(status, reason)
        self.idempotent_replays = Counter(
            "idempotency_cache_hits", "Answers replayed from a stored copy", ["source"], registry=registry
        )
        for source in ("postgres", "redis"):
            self.idempotent_replays.labels(source)
        self.idempotency_conflicts = Counter(
            "idempotency_conflicts", "Requests refused because of their key", ["kind"], registry=registry
        )
        for kind in ("reused", "in-progress"):
            self.idempotency_conflicts.labels(kind)
        self._messaging(registry)
        self._sagas(registry)
        registry.register(LOG_LINES_DROPPED)
        self.db_pool_in_use = Gauge("db_pool_in_use", "Connections lent out", registry=registry)

    def _messaging(self, registry: CollectorRegistry) -> None:
        self.outbox_pending = Gauge(
            "outbox_pending",
            "Rows not yet published nor parked, all of them; as of a second ago, or of 10 s while counting takes long",
            registry=registry,
        )
        self.outbox_oldest_pending_age = Gauge(
            "outbox_oldest_pending_age_seconds", "Age of the oldest pending row", registry=registry
        )
        self.outbox_parked = Gauge("outbox_parked", "Rows set aside after too many refusals", registry=registry)
        self.outbox_published = Counter("outbox_published", "Rows confirmed by the broker", registry=registry)
        self.outbox_publish_failed = Counter(
            "outbox_publish_failed",
            "Rows that were not confirmed, once for each try: refused, or in a batch that an outage took",
            registry=registry,
        )
        self.outbox_returned = Counter("outbox_returned", "Messages that no queue took", registry=registry)
        self.consumer_processed = Counter("consumer_processed", "Messages that took effect", registry=registry)
        self.consumer_dedup_hits = Counter(
            "consumer_dedup_hits", "Deliveries of messages that had taken effect before", registry=registry
        )
        self.consumer_failed = Counter("consumer_failed", "Handler failures", registry=registry)
        self.dlq_messages = Counter("dlq_messages", "Messages dead-lettered", registry=registry)
        self.dlq_depth = Gauge("dlq_depth", "Dead letters that wait for an operator", registry=registry)
        self.queue_depth = Gauge("queue_depth", "Messages that wait for a consumer", ["queue"], registry=registry)
        self.queue_depth.labels(QUEUE)
        self.outbox_resent = Counter(
            "outbox_resent", "Published rows made pending again, as their orders had not started", registry=registry
        )
        self.orders_unstarted = Gauge(
            "orders_unstarted", "Orders placed a minute ago or earlier whose saga has not started", registry=registry
        )
        self.pruned = Counter("janitor_pruned", "Rows removed after their retention", ["table"], registry=registry)
        self.prune_failed = Counter(
            "janitor_failures", "Passes that an error ended for a table", ["table"], registry=registry
        )
        for table in PRUNED_TABLES:
            self.pruned.labels(table)
            self.prune_failed.labels(table)

    def _sagas(self, registry: CollectorRegistry) -> None:
        self.saga_in_flight = Gauge(
            "saga_in_flight", "Unfinished sagas, by their order's status", ["status"], registry=registry
        )
        for status in ("pending", "compensating"):
            self.saga_in_flight.labels(status)
        self.saga_oldest_unfinished_age = Gauge(
            "saga_oldest_unfinished_age_seconds", "Age of the oldest unfinished saga", registry=registry
        )
        self.saga_needs_operator = Gauge(
            "saga_needs_operator",
            "Unfinished sagas with an undo that has failed for long, or with a call that no retry mends",
            registry=registry,
        )
        self.partner_circuit_state = Gauge(
            "partner_circuit_state",
            "Whether this process leaves a partner alone: 0 closed, 1 half-open, 2 open",
            ["partner"],
            registry=registry,
        )
        for partner in PARTNERS:
            self.partner_circuit_state.labels(partner)
        self.saga_duration = Histogram(
            "saga_duration_seconds", "Start of a saga to its end", buckets=SAGA_SECONDS, registry=registry
        )
        self.saga_step_duration = Histogram(
            "saga_step_duration_seconds",
            "One call to a partner",
            ["step", "action", "outcome"],
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.inventory_holds_expired = Counter(
            "inventory_holds_expired",
            "Sagas that turned back because their stock was no longer held",
            registry=registry,
        )
        self.compensation_failed = Counter(
            "saga_compensation_failed",
            "Attempts to undo a step that did not succeed",
            ["step"],
            registry=registry,
        )
        for action, steps in STEPS.items():
            for step, outcome in itertools.product(steps, OUTCOMES[action]):
                self.saga_step_duration.labels(step, action, outcome)
        for step in STEPS["undo"]:
            self.compensation_failed.labels(step)

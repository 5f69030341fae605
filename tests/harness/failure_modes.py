"""What each failure looks like from outside: the one table behind docs/failure-modes.md and its test."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FailureMode:
    """A failure, and what shows it.

    `waiting_for` and `says`: of `why_stuck`; None: the order has ended with `status_reason`, or (`answer`) the timeline
    itself cannot be read. `metric`, `labels`: at least 1 then, summed over the matching series. No `alert`: `because`.
    """

    name: str
    metric: str
    waiting_for: str | None = None
    says: str | None = None
    status_reason: str | None = None
    answer: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    alert: str | None = None
    because: str | None = None


CHARGE = {"step": "charge_payment", "action": "do"}
MODES = (
    FailureMode("broker down", "outbox_pending", "broker", "waits to be published", alert="OutboxNotPublishing"),
    FailureMode("parked row", "outbox_parked", "operator", "orders outbox requeue", alert="OutboxParked"),
    FailureMode("dead letter", "dlq_depth", "operator", "orders dlq replay", alert="DeadLetters"),
    FailureMode("dead letter lost", "orders_unstarted", "operator", "is a dead letter", alert="OrdersUnstarted"),
    FailureMode(
        "partner down",
        "saga_step_duration_seconds_count",
        "inventory",
        "it could not be reached",
        labels={"step": "reserve_inventory", "outcome": "not-sent"},
        alert="SagaUnfinished",
    ),
    FailureMode(
        "circuit open",
        "partner_circuit_state",
        "payment",
        "its circuit is open",
        labels={"partner": "payment"},
        alert="PartnerCircuitOpen",
    ),
    FailureMode(
        "unknown charge",
        "saga_step_duration_seconds_count",
        "payment",
        "no clear answer",
        labels={**CHARGE, "outcome": "unknown"},
        alert="PaymentSuccessLow",
    ),
    FailureMode(
        "undo failing",
        "saga_compensation_failed_total",
        "payment",
        "the undo of charge_payment",
        labels={"step": "charge_payment"},
        alert="SagaCompensationFailing",
    ),
    FailureMode(
        "operator needed", "saga_needs_operator", "operator", "An operator must look at it", alert="SagaNeedsOperator"
    ),
    FailureMode(
        "no consumer",
        "queue_depth",
        "broker",
        "no consumer has taken it",
        labels={"queue": "orders.saga"},
        alert="ConsumerDown",
    ),
    FailureMode("no relay", "outbox_pending", "operator", "no process with the role relay", alert="RelayDown"),
    FailureMode(
        "database slow",
        "http_server_request_duration_seconds_count",
        answer="database-unavailable",
        labels={"status": "503"},
        alert="RelayDown",
    ),
    FailureMode("hold expired", "inventory_holds_expired_total", status_reason="hold-expired", alert="HoldExpiryHigh"),
    FailureMode(
        "deadline passed",
        "orders_finished_total",
        status_reason="timed-out",
        labels={"status": "rejected", "reason": "timed-out"},
        alert="SagaCompletionLow",
    ),
    FailureMode(
        "card declined",
        "orders_finished_total",
        status_reason="card-declined",
        labels={"status": "rejected", "reason": "card-declined"},
        because="it is the customer's, not ours to prevent",
    ),
)

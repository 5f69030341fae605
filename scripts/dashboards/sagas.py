"""Sagas and the partners that they call."""

from scripts.dashboards.model import Dashboard, Panel, Query, quantiles
from scripts.dashboards.shared_panels import COMPLETION, DURATION, NEEDS_OPERATOR, OLDEST_SAGA

CALLS = "saga_step_duration_seconds"

SAGAS = Dashboard(
    "sagas",
    "saga and partners",
    "Do sagas end, which partner delays them, and is anything left to undo?",
    [
        Panel(
            "How many sagas run?",
            "By the status of their orders. Compensating: money or stock is being given back.",
            "short",
            [Query("max by (status) (saga_in_flight)", "{{status}}")],
        ),
        OLDEST_SAGA,
        DURATION,
        COMPLETION,
        Panel(
            "Which partner is slow?",
            "The 99th percentile of calls, of 5 minutes, by step and action.",
            "s",
            [Query("orders:saga_step_duration_seconds:p99_5m", "{{action}} {{step}}")],
        ),
        Panel(
            "How long does a call take?",
            "All calls to partners. A dot is one traced call; click it to see the trace.",
            "s",
            quantiles(f"{CALLS}_bucket"),
        ),
        Panel(
            "How do partners answer?",
            "Refused: the partner says no for a reason. Unknown: it may have been done; the call is repeated with the"
            " same key. Not-sent: it never arrived.",
            "ops",
            [
                Query(
                    f"sum by (step, action, outcome) (rate({CALLS}_count[$__rate_interval])) > 0",
                    "{{action}} {{step}}: {{outcome}}",
                )
            ],
        ),
        Panel(
            "What share of the charges succeeds?",
            "Of the last 30 minutes. Declined cards do not count. The others are sent again with the same key, so no"
            " customer is charged twice.",
            "percentunit",
            [
                Query(
                    'sum(orders:charges:increase30m{outcome="done"})'
                    ' / sum(orders:charges:increase30m{outcome=~"done|unknown|not-sent"})',
                    "charges",
                )
            ],
            limit=0.98,
            low_is_bad=True,
            alert="PaymentSuccessLow",
        ),
        Panel(
            "Is the circuit of a partner open?",
            "0: closed, calls are made. 1: half-open, one call is tried. 2: open, sagas wait.",
            "short",
            [Query("max by (partner) (partner_circuit_state)", "{{partner}}")],
            limit=2,
            alert="PartnerCircuitOpen",
        ),
        Panel(
            "Has an operator paused a partner?",
            "1: no call is made, do or undo, until the pause ends. `orders partner list` says until when, and why.",
            "short",
            [Query("max by (partner) (partner_paused)", "{{partner}}")],
            limit=1,
            alert="PartnerPaused",
        ),
        Panel(
            "Does an undo fail?",
            "Failed attempts per second, by step. Retries continue until it succeeds.",
            "ops",
            [Query("sum by (step) (rate(saga_compensation_failed_total[$__rate_interval]))", "{{step}}")],
            alert="SagaCompensationFailing",
        ),
        Panel(
            "What share of the orders lost its stock?",
            "Of the last 30 minutes: the hold had expired before it was committed.",
            "percentunit",
            [Query("sum(increase(inventory_holds_expired_total[30m])) / orders:finished:increase30m", "holds expired")],
            limit=0.005,
            alert="HoldExpiryHigh",
        ),
        NEEDS_OPERATOR,
    ],
)

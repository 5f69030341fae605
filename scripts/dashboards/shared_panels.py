"""Panels that stand on two pages: on the overview, and on the page with the details."""

from scripts.dashboards.model import Panel, Query, quantiles

COMPLETION = Panel(
    "What share of the orders ends as it should?",
    "Of the last 30 minutes. A declined card or missing stock counts as a good end; a timeout, an expired hold or"
    " an operator's compensation does not.",
    "percentunit",
    [Query("1 - orders:failed:increase30m / orders:finished:increase30m", "completed")],
    limit=0.995,
    low_is_bad=True,
    alert="SagaCompletionLow",
)

DURATION = Panel(
    "How long does an order take?",
    "From the start of its saga to its end. A dot is one traced order; click it to see the trace.",
    "s",
    quantiles("saga_duration_seconds_bucket"),
    limit=10,
    alert="SagaSlow",
)

NEEDS_OPERATOR = Panel(
    "Does a saga need an operator?",
    "Sagas with an undo that keeps failing, or a call that retrying cannot fix. Money or stock may stay taken.",
    "short",
    [Query("max(saga_needs_operator)", "sagas")],
    limit=1,
    alert="SagaNeedsOperator",
    kind="stat",
)

OLDEST_EVENT = Panel(
    "How long has the oldest event waited to be published?",
    "Rises while the broker is down or no relay works. Nothing is lost meanwhile.",
    "s",
    [Query("max(outbox_oldest_pending_age_seconds)", "oldest event")],
    limit=60,
    alert="OutboxOldestPending",
)

OLDEST_SAGA = Panel(
    "How old is the oldest unfinished saga?",
    "A saga past its deadline compensates. If it still does not end, a partner does not undo.",
    "s",
    [Query("max(saga_oldest_unfinished_age_seconds)", "oldest saga")],
    limit=300,
    alert="SagaUnfinished",
)

UNSTARTED = Panel(
    "Has every order a saga?",
    "Orders without a saga a minute after they were placed: nothing was charged, and they do not go on.",
    "short",
    [Query("max(orders_unstarted)", "orders without a saga")],
    limit=1,
    alert="OrdersUnstarted",
)

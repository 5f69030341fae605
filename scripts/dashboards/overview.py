"""The first page to open: are orders taken, do they end, is money safe, and who has to act?"""

from scripts.dashboards.model import Dashboard, Panel, Query
from scripts.dashboards.shared_panels import (
    COMPLETION,
    DURATION,
    NEEDS_OPERATOR,
    OLDEST_EVENT,
    OLDEST_SAGA,
    UNSTARTED,
)

OVERVIEW = Dashboard(
    "overview",
    "overview",
    "Are orders taken, do they end, is money safe, and who has to act?",
    [
        Panel(
            "Are orders taken, and do they end?",
            "Both lines are the same when all is well. If fewer end than arrive, look at the sagas.",
            "ops",
            [
                Query("sum(rate(orders_placed_total[$__rate_interval]))", "placed"),
                Query("sum(rate(orders_finished_total[$__rate_interval]))", "finished"),
            ],
        ),
        COMPLETION,
        DURATION,
        Panel(
            "How do orders end?",
            "By status and reason. A confirmed order has no reason.",
            "ops",
            [
                Query(
                    "sum by (status, reason) (rate(orders_finished_total[$__rate_interval])) > 0",
                    "{{status}} {{reason}}",
                )
            ],
        ),
        Panel(
            "Is an invariant violated?",
            "Orders that violate one of docs/invariants.md, as the janitor found. `orders verify` names them.",
            "short",
            [Query("max by (invariant) (invariant_violations)", "{{invariant}}")],
            limit=1,
            alert="InvariantViolated",
            kind="stat",
        ),
        NEEDS_OPERATOR,
        OLDEST_EVENT,
        OLDEST_SAGA,
        UNSTARTED,
        Panel(
            "Which alerts fire?",
            "The number of series for which each alert fires. No line: none fires.",
            "short",
            [Query('count by (alertname, severity) (ALERTS{alertstate="firing"})', "{{alertname}} ({{severity}})")],
        ),
        Panel(
            "Does every process answer?",
            "1: the last scrape of the process succeeded.",
            "short",
            [Query('up{job="orders"}', "{{instance}}")],
            limit=1,
            low_is_bad=True,
            alert="TargetDown",
        ),
        Panel(
            "Are log lines or spans lost?",
            "Lines that the reader of a log was too slow for, and spans that the collector was too slow for. The"
            " service is not affected.",
            "ops",
            [
                Query("sum by (instance) (rate(log_lines_dropped_total[$__rate_interval]))", "lines of {{instance}}"),
                Query("sum by (instance) (rate(trace_spans_dropped_total[$__rate_interval]))", "spans of {{instance}}"),
            ],
            alert="LogLinesDropped",
        ),
    ],
)

"""What clients see: requests, latencies, errors, and repeats of requests."""

from scripts.dashboards.model import Dashboard, Panel, Query, quantiles

REQUESTS = "http_server_request_duration_seconds"

INTAKE = Dashboard(
    "intake",
    "intake",
    "What do clients see: how fast, how often, and how often not?",
    [
        Panel(
            "Which requests arrive?",
            "By method and route.",
            "ops",
            [Query(f"sum by (method, route) (rate({REQUESTS}_count[$__rate_interval]))", "{{method}} {{route}}")],
        ),
        Panel(
            "How are they answered?",
            "By status. 409 and 422 are often refusals because of a key; 503 is a lost dependency or overload.",
            "ops",
            [Query(f"sum by (status) (rate({REQUESTS}_count[$__rate_interval]))", "{{status}}")],
        ),
        Panel(
            "How long does a client wait for its order?",
            "POST /orders that was accepted. A dot is one traced request; click it to see the trace.",
            "s",
            quantiles(f'{REQUESTS}_bucket{{method="POST", route="/orders", status="201"}}'),
        ),
        Panel(
            "Which route is slow?",
            "The 99th percentile of 5 minutes. A long poll of an order waits on purpose.",
            "s",
            [Query("orders:http_server_request_duration_seconds:p99_5m", "{{method}} {{route}}")],
        ),
        Panel(
            "What share of the responses is an error of the service?",
            "Responses 5xx. No line: there has been none.",
            "percentunit",
            [
                Query(
                    f'sum(rate({REQUESTS}_count{{status=~"5.."}}[$__rate_interval]))'
                    f" / sum(rate({REQUESTS}_count[$__rate_interval]))",
                    "5xx",
                )
            ],
        ),
        Panel(
            "What share of the requests for orders are repeats?",
            "Of the last 30 minutes. Clients that do not get their responses send them again.",
            "percentunit",
            [
                Query(
                    "sum(increase(idempotency_cache_hits_total[30m])) /"
                    " (sum(increase(idempotency_cache_hits_total[30m])) + sum(increase(orders_placed_total[30m])))",
                    "repeats",
                )
            ],
            limit=0.01,
            alert="ReplayRateHigh",
        ),
        Panel(
            "Where do repeated responses come from?",
            "Redis saves Postgres the work. If it is down, all come from Postgres.",
            "ops",
            [Query("sum by (source) (rate(idempotency_cache_hits_total[$__rate_interval]))", "{{source}}")],
        ),
        Panel(
            "Which requests are refused because of their key?",
            "By kind: the key is in use, or was used for another request. Look for a client with a bug.",
            "ops",
            [Query("sum by (kind) (rate(idempotency_conflicts_total[$__rate_interval]))", "{{kind}}")],
        ),
    ],
)

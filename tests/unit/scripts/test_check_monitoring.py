"""The check of metric names finds every name in a query, and nothing else."""

import pytest

from scripts.check_monitoring import IN_PROSE, exported, expressions, metric_names

QUERIES = {
    'max by (queue) (queue_depth{queue=~"a|b"}) > 1000': {"queue_depth"},
    "sum(increase(a_total[5m] offset 1h)) / on (job) group_left (x) b_total": {"a_total", "b_total"},
    "histogram_quantile(0.99, sum by (le, route) (rate(c_bucket[$__rate_interval])))": {"c_bucket"},
    "d:e:f unless absent(g) or vector(0) and h == bool 1.5e3": {"d:e:f", "g", "h"},
    'label_replace(i, "x", "$1", "y", "(j)")': {"i"},
    "topk(5, k) # of l": {"k"},
    "time() - max(m{instance='n'}) > +Inf": {"m"},
    "sum without(instance)(o) * ignoring(q) p": {"o", "p"},
    "max_over_time(r[5m:10s])": {"r"},
}


@pytest.mark.parametrize("query", QUERIES)
def test_the_metrics_of_a_query_are_found(query: str) -> None:
    assert metric_names(query) == QUERIES[query]


def test_every_query_of_a_dashboard_is_found() -> None:
    """Those of nested panels, of annotations, and of variables."""
    dashboard = {
        "annotations": {"list": [{"expr": "a"}]},
        "panels": [{"panels": [{"targets": [{"expr": "b"}, {"expr": "c"}]}]}],
        "templating": {"list": [{"query": {"query": "label_values(d{x='y'}, instance)"}, "title": "e"}]},
    }
    assert list(expressions(dashboard)) == ["a", "b", "c", "d{x='y'}"]


def test_metrics_in_prose_are_found() -> None:
    """Columns, settings and labels are no metrics."""
    text = "`a_b_total` rises, `c_depth{queue}` > 0; `deadline_seconds`, `needs_operator_at`, `X_TOTAL`, `age_seconds`"
    assert IN_PROSE.findall(text) == ["a_b_total", "c_depth"]


def test_series_have_the_endings_of_their_types() -> None:
    series, histograms = exported()
    assert {"orders_placed_total", "outbox_pending", "saga_duration_seconds_bucket"} <= series
    assert "saga_duration_seconds" in histograms - series

"""The form of a dashboard: panels, and the JSON that Grafana reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}  # deploy/grafana/provisioning/datasources
SCHEMA_VERSION = 39  # of Grafana 10.3; newer releases upgrade it when they load the file
WIDTH, HEIGHT, COLUMNS = 12, 8, 2
OK, BAD = "green", "red"


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the legend of its series. With `exemplars`, Grafana draws links to traces."""

    expression: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A question, and the queries that answer it.

    Values of `limit` and above are bad, or those below it if `low_is_bad`. `alert` is the alert rule with this limit; a
    rule `> 0` about a count has the limit 1. `unit` is an id of Grafana's: `short`, `s`, `ops` (per second),
    `percentunit`.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    limit: float | None = None
    alert: str | None = None
    low_is_bad: bool = False
    kind: str = "timeseries"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels. `name` is that of its file, and part of its address."""

    name: str
    title: str
    description: str
    panels: Sequence[Panel]


def quantiles(bucket: str) -> Sequence[Query]:
    """Return the median and the 99th percentile of a histogram. `bucket` selects its `_bucket` series."""
    rate = f"sum by (le) (rate({bucket}[$__rate_interval]))"
    return [
        Query(f"histogram_quantile(0.5, {rate})", "half take less"),
        Query(f"histogram_quantile(0.99, {rate})", "99 % take less", exemplars=True),
    ]


def render(dashboard: Dashboard, others: Sequence[Dashboard]) -> str:
    """Return the dashboard as JSON, with links to the others."""
    document = {
        "uid": f"orders-{dashboard.name}",
        "title": f"Orders: {dashboard.title}",
        "description": dashboard.description,
        "tags": ["orders"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "utc",
        "graphTooltip": 1,  # one cursor in all panels
        "links": [_link(other) for other in others if other is not dashboard],
        "panels": [_panel(panel, place) for place, panel in enumerate(dashboard.panels)],
    }
    return json.dumps(document, indent=2) + "\n"


def _link(dashboard: Dashboard) -> Mapping[str, Any]:
    url = f"/d/orders-{dashboard.name}"
    return {"type": "link", "title": dashboard.title, "url": url, "keepTime": True, "includeVars": False}


def _panel(panel: Panel, place: int) -> Mapping[str, Any]:
    row, column = divmod(place, COLUMNS)
    return {
        "id": place + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel),
        "datasource": PROMETHEUS,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": STAT if panel.kind == "stat" else TIMESERIES,
        "targets": [_target(query, chr(ord("A") + number)) for number, query in enumerate(panel.queries)],
    }


def _description(panel: Panel) -> str:
    return panel.description if panel.alert is None else f"{panel.description} Alert: {panel.alert} (docs/runbook.md)."


TIMESERIES = {
    "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}
STAT = {
    "reduceOptions": {"calcs": ["lastNotNull"]},
    "colorMode": "background",
    "graphMode": "area",
    "textMode": "value_and_name",
}


def _defaults(panel: Panel) -> Mapping[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _steps(panel)}}
    defaults |= {"max": 1} if panel.low_is_bad else {"min": 0}  # room for the line of the limit
    if panel.kind == "timeseries":
        style = "off" if panel.limit is None else "line"
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never", "thresholdsStyle": {"mode": style}}
    return defaults


def _steps(panel: Panel) -> Sequence[Mapping[str, Any]]:
    if panel.limit is None:
        return [{"color": OK, "value": None}]
    low, high = (BAD, OK) if panel.low_is_bad else (OK, BAD)
    return [{"color": low, "value": None}, {"color": high, "value": panel.limit}]


def _target(query: Query, name: str) -> Mapping[str, Any]:
    return {
        "refId": name,
        "datasource": PROMETHEUS,
        "expr": query.expression,
        "legendFormat": query.legend,
        "exemplar": query.exemplars,
        "range": True,
    }

"""Check that alert rules, dashboards and documents name only metrics and alerts that exist; exit 1 if not."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from app.bootstrap import metrics
from app.observability.signals import Signals
from app.operations import ages

REPOSITORY = Path(__file__).parents[1]
RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yml"
DASHBOARDS = REPOSITORY / "deploy" / "grafana"
RUNBOOK = REPOSITORY / "docs" / "runbook.md"

ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}  # of the series, by type
OF_PROMETHEUS = frozenset({"up", "ALERTS", "scrape_duration_seconds", "scrape_samples_scraped"})
KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan", "start", "end"})
LABEL_LIST = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
NAME = re.compile(r"(?<![\w:$.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
VARIABLE = re.compile(r"label_values\((.*),[^,]*\)$")
# In prose, only names with an ending that no column and no setting has are recognised.
IN_PROSE = re.compile(
    r"`([a-z]+(?:_[a-z]+)*(?:_total|_depth|_bucket|_age_seconds|_timestamp_seconds|_duration_seconds))\b"
)
PROMQL_BLOCK = re.compile(r"```promql\n(.*?)```", re.DOTALL)
RUNBOOK_LINK = re.compile(r"runbook\.md#([\w-]+)")


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    text = re.sub(r"#.*", "", expression)
    text = re.sub(r"\"[^\"]*\"|'[^']*'", "", text)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = LABEL_LIST.sub("", text)
    return {name for name in NAME.findall(text) if name.lower() not in KEYWORDS}


def exported() -> tuple[set[str], set[str]]:
    """Return the names of the series that a process exports, and those of its histograms."""
    registry = metrics.install(Signals())
    metrics.install_gauges(registry, None, lambda: 0)
    families = list(registry.collect())
    series = {f"{family.name}{ending}" for family in families for ending in ENDINGS.get(family.type, ("",))}
    return series, {family.name for family in families if family.type == "histogram"}


def rules() -> list[dict[str, Any]]:
    """Return the recording and alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions(value: Any) -> Iterator[str]:
    """Return every query in a dashboard: those of panels, annotations and variables."""
    if isinstance(value, list):
        for item in value:
            yield from expressions(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "expr":
                yield item
            elif isinstance(item, str) and (variable := VARIABLE.match(item)):
                yield variable[1]
            else:
                yield from expressions(item)


def queried() -> Iterator[tuple[str, str]]:
    """Return where a query names a metric, and the metric."""
    for rule in rules():
        place = f"{RULES.name}: {rule.get('alert') or rule['record']}"
        yield from ((place, name) for name in metric_names(rule["expr"]))
    for path in sorted(DASHBOARDS.rglob("*.json")):
        for expression in expressions(json.loads(path.read_text())):
            yield from ((path.name, name) for name in metric_names(expression))
    for path in documents():
        for block in PROMQL_BLOCK.findall(path.read_text()):
            yield from ((path.name, name) for line in block.splitlines() for name in metric_names(line))
    yield from (("ages.py", limit.metric) for limit in ages.LIMITS if limit.metric is not None)


def in_prose() -> Iterator[tuple[str, str]]:
    """Return where a document names a metric, and the metric."""
    for path in documents():
        yield from ((path.name, name) for name in IN_PROSE.findall(path.read_text()))


def documents() -> list[Path]:
    """Return the pages that describe the service as it is now."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    return sorted(path for path in pages if path.name != "CHANGELOG.md")


def problems() -> Iterator[str]:
    """Return a sentence for each name that does not exist."""
    series, histograms = exported()
    known = series | {rule["record"] for rule in rules() if "record" in rule} | OF_PROMETHEUS
    unknown = [(place, name) for place, name in queried() if name not in known]
    unknown += [(place, name) for place, name in in_prose() if name not in known | histograms]
    for place, name in sorted(set(unknown)):
        yield f"{place} names the metric {name}, which no process exports"
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    for limit in ages.limited():
        if limit.alert not in alerts:
            yield f"ages.py names the alert {limit.alert}, which {RULES.name} does not have"
    yield from _problems_of_the_runbook(alerts)


def _problems_of_the_runbook(alerts: set[str]) -> Iterator[str]:
    headings = set(re.findall(r"^#+ (\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    yield from (f"{RUNBOOK.name} has no section {name}" for name in sorted(alerts - headings))
    anchors = {heading.lower() for heading in headings}
    for path in [*documents(), RULES]:
        for anchor in sorted(set(RUNBOOK_LINK.findall(path.read_text())) - anchors):
            yield f"{path.name} links to #{anchor}, which {RUNBOOK.name} does not have"


def main() -> int:
    """Print what is wrong."""
    found = list(problems())
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The alert rules, and what their unit tests try."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.harness.processes import REPOSITORY
from tests.harness.prometheus import RULES, RULES_TEST

RUNBOOK = REPOSITORY / "docs" / "runbook.md"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """One alert rule."""

    name: str
    expr: str
    severity: str
    annotations: dict[str, str]


def alert_rules() -> list[AlertRule]:
    """Return the alerts of deploy/prometheus/rules.yml."""
    rules = [rule for group in _read(RULES)["groups"] for rule in group["rules"]]
    return [
        AlertRule(rule["alert"], rule["expr"], rule["labels"]["severity"], rule["annotations"])
        for rule in rules
        if "alert" in rule
    ]


def tried(*, firing: bool) -> set[str]:
    """Return the alerts that a unit test expects to fire, or not to fire."""
    checks = [check for test in _read(RULES_TEST)["tests"] for check in test["promql_expr_test"]]
    names = [
        re.findall('alertname="(.*?)"', check["expr"])[0] for check in checks if bool(check["exp_samples"]) is firing
    ]
    return set(names)


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())

"""The form of the dashboards, and of the composition that shows them."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from scripts.dashboards.model import Panel
from scripts.dashboards.pages import DASHBOARDS
from tests.harness.processes import REPOSITORY
from tests.harness.prometheus import RULES

PANELS = [pytest.param(panel, id=f"{page.name}: {panel.title}") for page in DASHBOARDS for panel in page.panels]
# Each process reads these from Postgres or the broker, so all show the same number.
SHARED = "outbox_pending|outbox_oldest|outbox_parked|dlq_depth|queue_depth|saga_in_flight|saga_oldest|saga_needs"
COMPOSITION: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
OBS = [name for name, service in COMPOSITION["services"].items() if "obs" in service.get("profiles", ())]


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


@pytest.mark.parametrize("panel", PANELS)
def test_panel_asks_a_question_and_explains_the_answer(panel: Panel) -> None:
    assert panel.title.endswith("?")
    assert panel.description
    assert panel.unit in {"short", "s", "ops", "percentunit"}
    assert all(query.legend for query in panel.queries)


@pytest.mark.parametrize("panel", PANELS)
def test_query_adds_counters_and_does_not_add_copies(panel: Panel) -> None:
    """`sum` of a rate for counters, `max` for what each process reads from one place, no zero for what is absent."""
    for query in panel.queries:
        assert "vector(" not in query.expression
        assert not re.search(rf"sum[^(]*\((max_over_time\()?({SHARED})", query.expression)
        assert "_total" not in re.sub(r"(rate|increase)\([a-z_]+_total", "", query.expression)


@pytest.mark.parametrize("panel", PANELS)
def test_limit_is_that_of_the_alert(panel: Panel) -> None:
    """A panel's line is where its alert fires; `> 0` about a count is 1."""
    if panel.alert is None:
        assert panel.limit is None
        return
    [rule] = [rule for rule in rules() if rule.get("alert") == panel.alert]
    numbers = {float(number) for number in re.findall(r"[<>=]=? ([\d.]+)", rule["expr"])}
    if panel.alert == "TargetDown":
        numbers = {1.0}  # `up` is 0 or 1
    assert panel.limit in numbers or (panel.limit in {1, None} and 0 in numbers)


@pytest.mark.parametrize("name", OBS)
def test_observability_is_local_and_bounded(name: str) -> None:
    """Only this machine reaches it, it writes only where it must, and it has a limit."""
    service = COMPOSITION["services"][name]
    assert all(port.startswith("127.0.0.1:${") for port in service["ports"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert re.search(r":v?\d", service["image"])
    assert "healthcheck" in service or name == "otel-collector"
    mounted = [volume.split(":")[0] for volume in service.get("volumes", ()) if volume.startswith("./")]
    assert all((REPOSITORY / path).is_dir() for path in mounted)

"""The alert rules are valid, and each of them fires and does not fire."""

from pathlib import Path

import httpx

from app.db import Pool
from app.operations import ages
from tests.harness.ages import put_row
from tests.harness.alerts import RUNBOOK, alert_rules, tried
from tests.harness.prometheus import RULES, RULES_TEST, Prometheus, promtool
from tests.harness.wait import AMPLE_SECONDS, wait_until


def test_the_rules_are_valid() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid() -> None:
    """That of the compose profile `obs`, with the rules that it names."""
    done = promtool("check", "config", str(RULES.with_name("prometheus.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_tests_of_the_rules_pass() -> None:
    done = promtool("test", "rules", str(RULES_TEST))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways() -> None:
    """A unit test makes it fire, and one shows that it does not fire."""
    names = {rule.name for rule in alert_rules()}
    assert (tried(firing=True), tried(firing=False)) == (names, names)


def test_every_alert_says_what_to_do() -> None:
    """It has a severity, texts that name the effect, and a section of the runbook."""
    sections = RUNBOOK.read_text().splitlines()
    for rule in alert_rules():
        assert f"## {rule.name}" in sections
        assert rule.severity in {"page", "ticket"}, rule.name
        assert set(rule.annotations) == {"summary", "description", "runbook"}, rule.name
        assert rule.annotations["runbook"] == f"docs/runbook.md#{rule.name.lower()}"


async def test_a_real_prometheus_evaluates_every_rule(
    api: httpx.AsyncClient, pool: Pool, server_directory: Path
) -> None:
    """No rule has an error, and a parked event fires its alert."""
    async with Prometheus(server_directory, [api.base_url.port or 0]) as prometheus:
        await prometheus.wait_for_scrape()
        rules = await prometheus.wait_for_evaluation()
        assert {rule.name for rule in alert_rules()} < set(rules)
        assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}
        assert rules["OutboxParked"]["state"] == "inactive"
        await put_row(pool, next(limit for limit in ages.LIMITS if limit.alert == "OutboxParked"), 1)

        async def fires() -> bool:
            return bool((await prometheus.rules())["OutboxParked"]["state"] == "firing")

        await wait_until(fires, AMPLE_SECONDS, "the alert OutboxParked")

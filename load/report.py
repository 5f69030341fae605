"""Print a verdict for people, or as JSON."""

import dataclasses
import json
from collections.abc import Mapping

from load.progress import milliseconds
from load.verdict import Verdict

WIDTH = 18
MARKS = {"holds": "HOLDS", "violated": "VIOLATED", "not checked": "NOT CHECKED"}


def as_json(verdict: Verdict) -> str:
    """Return the verdict as one JSON object; times are in seconds, money in the currency's smallest unit."""
    return json.dumps(dataclasses.asdict(verdict), indent=2)


def as_text(verdict: Verdict) -> str:
    """Return the verdict as lines for a terminal."""
    money = verdict.charged_minor - verdict.refunded_minor
    lines = [
        _row("sent", f"{verdict.keys:,} keys in {verdict.requests:,} requests, {verdict.seconds:,.1f} s"),
        _row("responses", _counts(verdict.outcomes)),
        _row("gave up", f"{verdict.gave_up:,} clients, after their last request; the run asked again at the end"),
        _row("acknowledged", f"{verdict.acknowledged:,} ({verdict.orders_per_second:,.0f} per second)"),
        _row("orders", f"{verdict.orders:,} ({_counts(verdict.statuses)})"),
        _row("duplicates", f"{verdict.duplicates:,}"),
        _row("lost", f"{verdict.lost:,}"),
        _row("not finished", f"{verdict.unfinished:,}"),
        _row(
            "ledger",
            f"charged {_money(verdict.charged_minor)} - refunded {_money(verdict.refunded_minor)} = {_money(money)};"
            f" due {_money(verdict.due_minor)}",
        ),
        _row("POST to 201", _times(verdict.acknowledged_seconds)),
        _row("placed to final", _times(verdict.finished_seconds)),
        "",
    ]
    for violation in verdict.violations:
        lines.append(f"VIOLATED: {violation.promise}: {violation.count:,}")
        lines += [f"  {name}" for name in violation.names]
    if verdict.not_checked:
        lines.append(f"NOT CHECKED: {verdict.not_checked}")
        lines += [f"  {problem}" for problem in verdict.problems]
    lines.append(f"Verdict: {MARKS[verdict.outcome]}")
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name:<{WIDTH}}{value}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in counts.items()) or "none"


def _times(times: Mapping[str, float | None]) -> str:
    return "   ".join(f"{name} {milliseconds(seconds)}" for name, seconds in times.items())


def _money(minor: int) -> str:
    return f"{minor / 100:,.2f}"

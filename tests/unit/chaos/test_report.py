"""The verdict of a fault run and its report: a run fails for every reason that it should fail for."""

from collections import Counter
from pathlib import Path

import pytest

import load
from chaos.bugs import Catch
from chaos.runner import crash_points, reach, report
from chaos.runner.measure import Series
from chaos.runner.reach import COMMITS_WAITED, STATES, Evidence, Reached
from chaos.runner.verdict import ChaosVerdict, InjectedFault, recovery
from chaos.sweep.result import PointResult, SweepResult
from chaos.sweep.result import read as read_sweep
from chaos.sweep.result import write as write_sweep
from tests.unit.load.test_verdict import a_clean_run

POINT = "postgres app.messaging.outbox:claim 1 before"
FAULT = InjectedFault("api: kill -9", "api", 1.0, 2.0, None, 0.5)


def a_verdict() -> ChaosVerdict:
    """Return the verdict of a run in which everything held."""
    return ChaosVerdict(
        seed=1,
        orders=200,
        command="make chaos",
        versions={"PostgreSQL": "17"},
        load=load.judge(a_clean_run()),
        checker=[],
        verified={"I1": "holds"},
        failed_requests=0,
        failed_by_older=0,
        settled_seconds=1.0,
        faults=[FAULT],
        reached=[Reached(state, 1) for state in STATES],
        series=Series([0, None, 5], [1, None, 0], [10, 0, 10], [0.01, None, 0.02], [0.1, None, 0.2]),
        required=list(STATES),
    )


def a_sweep(violations: list[str]) -> SweepResult:
    """Return the result of a sweep over one point."""
    return SweepResult(
        "2026-01-01T00:00:00", "make sweep", {"commit": "abc"}, [PointResult("resent", POINT, violations)]
    )


def test_a_clean_run_holds() -> None:
    """The page is complete in itself, and says that every promise held."""
    page = report.as_html(a_verdict())
    assert a_verdict().violations == []
    assert "Every promise held" in page
    assert "api: kill -9" in page
    assert "http" not in page.lower().replace("by http alone", "")
    assert report.as_text(a_verdict()).endswith("Verdict: HOLDS")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"checker": ["I5: two charges"]}, "I5: two charges"),
        ({"verified": {"I5": "violated: 1"}}, "orders verify: I5 violated: 1"),
        ({"bugs": [Catch("the inbox is off", "I4", None, 1.0)]}, "planted bug not caught: the inbox is off"),
        ({"sweep": a_sweep(["I5: two charges"])}, f"crash point not recovered: resent, {POINT}"),
        ({"failed_requests": 2}, "2 requests failed unexpectedly: see http.failed in the logs"),
        ({"settled_seconds": None}, "the system was not quiet in time after the last fault"),
        ({"reached": [Reached(state, 0) for state in STATES]}, f"not reached: {next(iter(STATES))}"),
        (
            {"faults": [InjectedFault("redis: flush", "redis", 1.0, 1.0, "OSError: gone")]},
            "not injected: redis: flush: OSError: gone",
        ),
        ({"impossible": {"deployment: roll back": "no history"}}, "not injected: deployment: roll back: no history"),
    ],
)
def test_each_reason_fails_the_run(change: dict[str, object], reason: str) -> None:
    """A violation, a late end, a state that was not met and a fault that failed are all reasons."""
    verdict = a_verdict()
    for name, value in change.items():
        setattr(verdict, name, value)
    assert reason in verdict.violations
    assert f"VIOLATED: {reason}" in report.as_text(verdict)
    assert "violations" in report.as_html(verdict)


@pytest.mark.parametrize(("failed_by_older", "is_clean"), [(1, True), (0, False)])
def test_only_the_older_release_is_excused_for_a_500(failed_by_older: int, *, is_clean: bool) -> None:
    """While processes are rolled back, clients may get the older release's 500s, but no more than it logged."""
    seen = a_clean_run()
    seen.histories.by_number[0].add(500, "", b"{}")
    verdict = a_verdict()
    verdict.load, verdict.failed_by_older = load.judge(seen), failed_by_older
    assert (verdict.violations == []) is is_clean


def test_the_report_shows_crash_points() -> None:
    """The page has each call site with its library and its number of points, and what was wrong at one of them."""
    good = crash_points.as_html(a_sweep([]))
    assert "<td>postgres messaging\u200b.outbox:claim</td><td class=n>1</td><td class=n>1<" in good
    assert "commit abc" in good
    assert "did not recover" not in good
    bad = crash_points.as_html(a_sweep(["I5: two charges"]))
    assert "1 did not recover" in bad
    assert f"{POINT}: I5: two charges" in bad


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    """`--sweep` reads what `--output` wrote."""
    path = tmp_path / "sweep.json"
    write_sweep(a_sweep(["I5: two charges"]), path)
    assert read_sweep(path) == a_sweep(["I5: two charges"])


def test_recovery_is_measured_from_the_end_of_the_fault() -> None:
    """The service has recovered in the first full second with half of the usual 201s."""
    series = Series(acknowledged=[40, 40, 0, 0, 5, 30, 40])
    assert recovery(series, 2.5) == 2.5
    assert recovery(series, 6.5) is None
    assert recovery(Series(), 1.0) is None


def test_states_are_recognised_by_their_evidence(tmp_path: Path) -> None:
    """Log events are counted by name; a line that a kill interrupted is skipped."""
    log = tmp_path / "api.log"
    log.write_text('{"event": "commit.unknown"}\nTraceback (most recent call last):\n{"event": "commit.unk')
    evidence = reach.collect([log], [{"outcome": "replayed"}], a_clean_run(), Counter({COMMITS_WAITED: 2}))
    assert isinstance(evidence, Evidence)
    found = {row.state: row.count for row in reach.reached(evidence)}
    assert found["the answer to a COMMIT was lost, and the second attempt decided"] == 1
    assert found["a partner got a call again, and replayed its answer"] == 1
    assert found["a COMMIT waited for the standby"] == 2
    assert found["a runner lost its lease, and its write was refused"] == 0

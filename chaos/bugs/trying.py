"""Try whether a judge sees a planted bug. A judge that fails without the bug too has not seen it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.bugs.planting import Bug, planted

CAUGHT = 1  # pytest's exit code when a test failed; others mean that no test ran
PATIENCE_SECONDS = 300
PYTEST = ("pytest", "-q", "-x", "-p", "xdist", "-n0", "--no-header", "-p", "no:cacheprovider")
RUN_ORDERS = 300
RUN_PATIENCE_SECONDS = 900


@dataclass(frozen=True)
class Catch:
    """Whether a bug was caught, and by which test or judge. `problem`: why the bug could not be tried."""

    bug: str
    invariant: str
    caught_by: str | None
    seconds: float
    problem: str | None = None


def try_tests(bug: Bug, copy: Path) -> Catch:
    """Run the bug's tests in the copy until one fails, which must pass again without the bug."""
    started_at = time.monotonic()
    try:
        with planted(bug, copy):
            run = _python(copy, PATIENCE_SECONDS, *PYTEST, *bug.caught_by)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return Catch(bug.name, bug.invariant, None, 0.0, str(error))
    failed = _failed_test(run.stdout)
    problem = None if run.returncode in {0, CAUGHT} else f"pytest ended with {run.returncode}: {run.stdout[-300:]}"
    if failed and _python(copy, PATIENCE_SECONDS, *PYTEST, failed).returncode:
        failed, problem = None, f"{failed} fails without the bug too"
    return Catch(bug.name, bug.invariant, failed, round(time.monotonic() - started_at, 1), problem)


def try_run(bug: Bug, copy: Path) -> Catch:
    """Run `chaos.runner` in the copy with the bug's one fault. A judge of the run must find a broken promise."""
    started_at = time.monotonic()
    report = copy / "chaos-report"
    command = ["chaos.runner", "--orders", f"{RUN_ORDERS}", "--only", f"{bug.violates_with}", "--output", str(report)]
    (report / "report.json").unlink(missing_ok=True)
    try:
        with planted(bug, copy):
            run = _python(copy, RUN_PATIENCE_SECONDS, *command)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return Catch(bug.name, bug.invariant, None, 0.0, str(error))
    seconds = round(time.monotonic() - started_at, 1)
    if not (report / "report.json").exists():
        return Catch(bug.name, bug.invariant, None, seconds, f"no report: {run.stderr[-300:]}")
    verdict = json.loads((report / "report.json").read_text())
    failures = [fault["error"] for fault in verdict["faults"] if fault["error"]]
    problem = f"its fault could not be injected: {failures[0]}" if failures else None
    found = verdict["violations"] if run.returncode and not failures else []
    return Catch(bug.name, bug.invariant, found[0] if found else None, seconds, problem)


def _python(copy: Path, patience_seconds: float, *module_and_args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-m", *module_and_args],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=patience_seconds,
        check=False,
    )


def _failed_test(output: str) -> str | None:
    failed: Sequence[str] = [line for line in output.splitlines() if line.startswith("FAILED ")]
    return failed[0].removeprefix("FAILED ").partition(" - ")[0] if failed else None

"""A full run without the older release fails, and says why."""

import subprocess
import sys
from pathlib import Path

from chaos.bugs.planting import copy_repository
from chaos.runner import release
from tests.harness.processes import REPOSITORY

ASK = "from chaos.runner import faults; print(*faults.impossible().values())"


def test_an_archive_cannot_roll_back(tmp_path: Path) -> None:
    """Without the git history the fault is named as impossible, with the reason."""
    copy = copy_repository(tmp_path)
    asked = subprocess.run(
        [sys.executable, "-c", ASK], cwd=copy, env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True
    )
    assert f"commit {release.COMMIT[:10]} is not in the git history" in asked.stdout


def test_the_older_release_is_older_than_this_one() -> None:
    """The changelog has it below what is not released yet."""
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{release.VERSION}]")

"""The judges share no code with the service, so that a mistake in it cannot hide from them."""

import subprocess
import sys

import pytest

from tests.harness.processes import REPOSITORY

ASK = "import sys, {judge}; print(*(name for name in sys.modules if name.partition('.')[0] == 'app'))"


@pytest.mark.parametrize(
    "judge", ["load", "tests.harness.checker", "chaos.runner.verdict", "chaos.runner.reach", "chaos.bugs.trying"]
)
def test_a_judge_imports_nothing_of_the_service(judge: str) -> None:
    """Importing it, with everything that it imports itself, loads no module of `app`."""
    command = [sys.executable, "-c", ASK.format(judge=judge)]
    asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == []

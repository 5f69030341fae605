"""Variables that a library reads while it is imported cause no traceback."""

import os
import subprocess
import sys

import pytest

from tests.harness.processes import REPOSITORY


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "banana", 2),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "", 0),
        ("OTEL_PROPAGATORS", "banana", 0),
    ],
)
def test_a_bad_variable_causes_no_traceback(name: str, value: str, code: int) -> None:
    """A malformed limit is one line that names the variable; empty means the default; propagators are not obeyed."""
    command = [sys.executable, "-m", "app", "token", "--help"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, name: value}, capture_output=True, text=True, check=False
    )
    expected = f"orders: {name} must be a whole number that is 0 or more\n" if code else ""
    assert (result.returncode, result.stderr) == (code, expected)

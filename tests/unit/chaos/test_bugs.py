"""The planted bugs fit the code, and a bug that does not is an error."""

from collections import Counter
from pathlib import Path

import pytest

from chaos.bugs import BUGS, REPOSITORY, Bug, plant

EACH = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I9")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    """Its text occurs exactly once, the result is a program, and the tests that catch it exist."""
    copy = tmp_path / bug.path
    copy.parent.mkdir(parents=True)
    copy.write_text((REPOSITORY / bug.path).read_text())
    plant(bug, tmp_path)
    compile(copy.read_text(), bug.path, "exec")
    for test in bug.caught_by:
        path, _, name = test.partition("::")
        assert (REPOSITORY / path).exists()
        assert not name or f"def {name}(" in (REPOSITORY / path).read_text()


def test_a_bug_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """A table that has gone stale fails instead of testing nothing."""
    (tmp_path / "module.py").write_text("one = 1\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        plant(Bug("stale", "I1", "module.py", "two = 2", "two = 3", []), tmp_path)


def test_every_invariant_has_bugs() -> None:
    """At least two bugs break each invariant that a test can break."""
    bugs = Counter(bug.invariant for bug in BUGS)
    assert all(bugs[invariant] >= 2 for invariant in EACH)

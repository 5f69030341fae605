"""The planted bugs fit the code, and the machinery fails when a bug does not fit or is not caught."""

from collections import Counter
from pathlib import Path

import pytest

from chaos.bugs import BUGS, Bug
from chaos.bugs.__main__ import try_all
from chaos.bugs.planting import REPOSITORY, planted
from chaos.bugs.trying import try_tests
from chaos.runner import faults

EACH = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I9")
PROGRAM = "def charge(times):\n    return 1\n"
CHECK = "from module import charge\n\n\ndef test_one_charge():\n    assert charge(2) == 1\n"
CHARGES_TWICE = Bug("charges twice", "I5", "module.py", "return 1", "return times", ["test_module.py"])


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a program with one test, in which a bug can be planted."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # loading them takes longer than everything else
    (tmp_path / "module.py").write_text(PROGRAM)
    (tmp_path / "test_module.py").write_text(CHECK)
    return tmp_path


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    """Its text occurs exactly once, the result is a program, and what is to catch it exists."""
    copy = tmp_path / bug.path
    copy.parent.mkdir(parents=True)
    copy.write_text((REPOSITORY / bug.path).read_text())
    with planted(bug, tmp_path):
        compile(copy.read_text(), bug.path, "exec")
    for test in bug.caught_by:
        path, _, name = test.partition("::")
        assert (REPOSITORY / path).exists()
        assert not name or f"def {name}(" in (REPOSITORY / path).read_text()
    assert bug.violates_with is None or any(bug.violates_with in kind.name for kind in faults.kinds())


def test_a_bug_that_does_not_fit_is_an_error(copy: Path) -> None:
    """A table that has gone stale fails instead of testing nothing."""
    stale = Bug("stale", "I1", "module.py", "two = 2", "two = 3", [])
    with pytest.raises(ValueError, match="occurs 0 times"), planted(stale, copy):
        pass


def test_a_bug_is_caught_and_removed(copy: Path) -> None:
    """The test that fails is named, and the copy is as it was."""
    catch = try_tests(CHARGES_TWICE, copy)
    assert (catch.caught_by, catch.problem) == ("test_module.py::test_one_charge", None)
    assert (copy / "module.py").read_text() == PROGRAM


def test_a_bug_is_not_caught_without_its_check(copy: Path) -> None:
    """If the one assertion that sees the bug is removed, the bug is reported as not caught."""
    (copy / "test_module.py").write_text(CHECK.replace("assert charge(2) == 1", "assert charge(2)"))
    assert [catch.caught_by for catch in try_all([CHARGES_TWICE], copy, runs=False)] == [None]


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (CHECK.replace("== 1", "== 0"), "fails without the bug too"),
        ("", "pytest ended with 5"),
    ],
    ids=["broken", "no test"],
)
def test_a_broken_check_catches_nothing(copy: Path, check: str, problem: str) -> None:
    """A test that fails anyway, or that does not exist, has not seen the bug."""
    (copy / "test_module.py").write_text(check)
    catch = try_tests(CHARGES_TWICE, copy)
    assert catch.caught_by is None
    assert problem in (catch.problem or "")


def test_every_invariant_has_bugs() -> None:
    """At least two bugs break each invariant that a test can break."""
    bugs = Counter(bug.invariant for bug in BUGS)
    assert all(bugs[invariant] >= 2 for invariant in EACH)

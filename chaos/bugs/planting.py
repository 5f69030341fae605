"""A bug, and how it is planted in a scratch copy of the repository."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COPIED = ("app", "chaos", "load", "migrations", "sandbox", "scripts", "tests", "deploy", "docs", "pyproject.toml")


@dataclass(frozen=True)
class Bug:
    """A bug: in `path`, `good` becomes `bad`.

    `caught_by`: tests, of which at least one must fail. `violates_with`: a fault with which a run of `chaos.runner`
    must end as violated.
    """

    name: str
    invariant: str
    path: str
    good: str
    bad: str
    caught_by: Sequence[str]
    violates_with: str | None = None


def copy_repository(directory: Path) -> Path:
    """Copy everything that the tests need."""
    copy = directory / "copy"
    copy.mkdir()
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    return copy


@contextlib.contextmanager
def planted(bug: Bug, copy: Path) -> Iterator[None]:
    """Plant a bug in the copy, and remove it at the end. Raises ValueError unless its text occurs exactly once."""
    path = copy / bug.path
    text = path.read_text()
    if (found := text.count(bug.good)) != 1:
        raise ValueError(f"its text occurs {found} times in {bug.path}")
    path.write_text(text.replace(bug.good, bug.bad))
    try:
        yield
    finally:
        path.write_text(text)

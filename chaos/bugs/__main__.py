"""`python -m chaos.bugs`: plant each bug, and check that it is caught. Exit 1 if one is not."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from chaos.bugs import BUGS, Bug, Catch
from chaos.bugs.planting import copy_repository
from chaos.bugs.trying import try_run, try_tests


def main(
    only: Annotated[list[str] | None, typer.Option(help="Try only bugs whose name contains this.")] = None,
    *,
    runs: Annotated[bool, typer.Option(help="Let runs with faults catch the bugs, instead of tests.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
) -> None:
    """Plant each bug in turn, and check that its tests catch it. Exit 1 if one is not caught."""
    chosen = [bug for bug in BUGS if bug.violates_with or not runs]
    chosen = [bug for bug in chosen if not only or any(part in bug.name for part in only)]
    if not chosen:
        raise typer.BadParameter("no bug has such a name", param_hint="--only")
    with tempfile.TemporaryDirectory(prefix="orders-bugs-") as directory:
        catches = try_all(chosen, copy_repository(Path(directory)), runs=runs)
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(catch) for catch in catches], indent=1))
    sys.exit(1 if any(catch.caught_by is None for catch in catches) else 0)


def try_all(bugs: Sequence[Bug], copy: Path, *, runs: bool) -> list[Catch]:
    """Try each bug, and print what came of it."""
    catches = []
    for bug in bugs:
        catches.append(catch := try_run(bug, copy) if runs else try_tests(bug, copy))
        result = catch.problem or catch.caught_by or "NOT CAUGHT"
        typer.echo(f"{catch.invariant}  {catch.bug:<60}  {catch.seconds:5.1f} s  {result}")
    caught = sum(catch.caught_by is not None for catch in catches)
    typer.echo(f"{caught} of {len(catches)} planted bugs were caught")
    return catches


if __name__ == "__main__":
    typer.run(main)

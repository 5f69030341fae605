"""`python -m bench`: measure rows of the table. `make bench` measures all."""

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from bench import picture
from bench.lab import Lab, directory_of_a_run
from bench.regression import regressions
from bench.report import as_text
from bench.rounds import Comparison, Plan
from bench.rows import ROWS, SHAPES

SMOKE = Plan(rounds=1, seconds=1.0, smoke=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this row or shape: {', '.join((*ROWS, *SHAPES))}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender gets its turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one turn.")] = 3.0,
    against: Annotated[Path | None, typer.Option(help="Fail if a ratio fell below this bench.json.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the JSON and the picture.")] = Path("bench-report"),
    *,
    shapes: Annotated[bool, typer.Option("--shapes", help="Measure the shapes of load instead of the rows.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only prove that rows run; the figures mean nothing.")] = False,
) -> None:
    """Compare the service with floors and peers, in turns on the same servers."""
    if unknown := set(only or ()) - {*ROWS, *SHAPES}:
        raise typer.BadParameter(f"no row is called {', '.join(sorted(unknown))}", param_hint="--only")
    plan = SMOKE if smoke else Plan(rounds, seconds)
    with directory_of_a_run() as place, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(measure(only or list(SHAPES if shapes else ROWS), plan, place))
    output.mkdir(exist_ok=True)
    (output / "bench.json").write_text(
        json.dumps({name: asdict(row) for name, row in results.items()}, indent=1) + "\n"
    )
    (output / "bench.svg").write_text(picture.of_ratios(results))
    lost = list(regressions(json.loads(against.read_text()), results)) if against else []
    for line in lost:
        typer.echo(f"REGRESSION: {line}")
    sys.exit(1 if lost else 0)


async def measure(names: list[str], plan: Plan, directory: Path) -> dict[str, Comparison]:
    """Measure these rows on the same servers, and print each as it is done."""
    results = {}
    async with Lab(directory) as lab:
        for name in names:
            results[name] = await {**ROWS, **SHAPES}[name](lab, plan)
            typer.echo(as_text(name, results[name]))
    return results


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

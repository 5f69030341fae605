"""The sweep: record the points of each scenario, then die at each of them and check the recovery."""

import asyncio
import contextlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from app.observability import logs
from chaos.runner.system import keep_logs, running
from chaos.sweep.result import PointResult, SweepResult, write
from chaos.sweep.runs import front_settings, make_runs
from chaos.sweep.scenarios import SCENARIOS
from chaos.sweep.site import Site, open_site
from chaos.versions import read_versions
from tests.harness.run import ControllerRun


async def sweep(directory: Path, scenarios: list[str], every: int, command: str) -> SweepResult:
    """Sweep over every `every`th point of these scenarios, until one does not recover."""
    async with running(directory, processes={}) as system, open_site(system, directory) as site:
        result = SweepResult(
            datetime.now(UTC).isoformat(timespec="seconds"), command, await read_versions(system.postgres.url)
        )
        for scenario in scenarios:
            result.points += await _sweep_scenario(site, scenario, every)
            if result.failed:
                break
    return result


async def _sweep_scenario(site: Site, scenario: str, every: int) -> list[PointResult]:
    results: list[PointResult] = []
    settings = front_settings(SCENARIOS[scenario])
    front = None if settings is None else site.service("front", settings)
    async with front or contextlib.nullcontext():
        runs = make_runs(site, front, SCENARIOS[scenario])
        points = await runs.record()
        typer.echo(f"{scenario}: {len(points)} points", err=True)
        for point in points[::every]:
            results.append(result := PointResult(scenario, point, await runs.die_at(point)))
            typer.echo(f"  {point:<90} {'; '.join(result.violations) or 'recovered'}")
            if result.violations:
                break
    return results


def main(
    scenario: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)}; default: all.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Die only at every so many points.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
) -> None:
    """Kill the service, the janitor and the commands at every point of their way; exit 1 if one does not recover."""
    chosen = scenario or list(SCENARIOS)
    if unknown := set(chosen) - set(SCENARIOS):
        raise typer.BadParameter(f"there is no scenario {', '.join(unknown)}", param_hint="--scenario")
    options = " ".join([f"--every {every}", *(f"--scenario {name}" for name in scenario or ())])
    logs.configure_logging("console", "CRITICAL")  # of the consumer that makes dead letters
    servers = ControllerRun()
    try:
        result = asyncio.run(sweep(servers.directory, chosen, every, f'make sweep ARGS="{options}"'))
    finally:
        keep_logs(servers.directory, Path("chaos-report"))
        servers.close()
    typer.echo(f"{len(result.points)} points: {len(result.points) - len(result.failed)} recovered")
    if output is not None:
        write(result, output)
    sys.exit(1 if result.failed else 0)


if __name__ == "__main__":
    typer.run(main)

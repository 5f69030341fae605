"""`python -m chaos.runner`: load with induced failures. Exit 1 on a violation."""

import asyncio
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from chaos.bugs import Catch
from chaos.runner import faults, report
from chaos.runner.run import ORDERS_PER_SECOND, RunConfig, run
from chaos.runner.system import keep_logs
from chaos.sweep.result import read as read_sweep
from tests.harness.run import ControllerRun


def main(
    orders: Annotated[int, typer.Option(min=10, max=1_000_000, help="Keyed orders to send.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Decides the schedule of faults, and what is ordered.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Inject only faults whose name contains this.")] = None,
    rate: Annotated[float, typer.Option(min=1, help="Orders per second.")] = ORDERS_PER_SECOND,
    broker_nodes: Annotated[int, typer.Option(min=1, max=5, help="Run RabbitMQ as so many nodes.")] = 1,
    bugs: Annotated[Path | None, typer.Option(help="Show this result of `make planted-bugs` in the report.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="Show this result of `make sweep` in the report.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the report and the logs.")] = Path("chaos-report"),
) -> None:
    """Load the whole system while faults are injected into every part of it, and judge what is left."""
    options = " ".join([f"--orders {orders} --seed {seed}", *(f"--only '{part}'" for part in only or ())])
    options += f" --rate {rate:g}" if rate != ORDERS_PER_SECOND else ""
    options += f" --broker-nodes {broker_nodes}" if broker_nodes > 1 else ""
    catches = [Catch(**catch) for catch in json.loads(bugs.read_text())] if bugs is not None else []
    swept = read_sweep(sweep) if sweep is not None else None
    command = f'make chaos ARGS="{options}"'
    config = RunConfig(orders, seed, tuple(only or ()), command, catches, broker_nodes, swept, rate)
    for kind, reason in faults.impossible().items():
        typer.echo(f"cannot inject {kind}: {reason}", err=True)
    if not config.kinds():
        raise typer.BadParameter("no fault that can be injected has such a name", param_hint="--only")
    typer.echo(f"{orders:,} orders and faults for {config.duration_seconds:.0f} s, seed {seed}", err=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything ends with this process
    servers = ControllerRun()
    try:
        verdict = asyncio.run(run(config, servers.directory))
    finally:
        keep_logs(servers.directory, output)
        servers.close()
    (output / "report.html").write_text(report.as_html(verdict))
    (output / "report.json").write_text(
        json.dumps({**dataclasses.asdict(verdict), "violations": verdict.violations}, indent=1)
    )
    typer.echo(report.as_text(verdict))
    typer.echo(f"Report: {output / 'report.html'}")
    sys.exit(1 if verdict.violations else 0)


if __name__ == "__main__":
    typer.run(main)

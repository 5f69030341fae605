"""`orders verify`: prove the invariants from tables, broker and partners, on the running system."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from app import db, settings
from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import queues
from app.bootstrap.verification import find_books, make_config, make_verifier
from app.cli.options import AsJson, DataDir, parse_duration, servers
from app.demo.stack import SANDBOX_URL_FILE, connections
from app.observability.signals import Signals
from app.operations.verify.report import InvariantVerdict, VerdictStatus, VerifyReport
from app.operations.verify.run import Scope
from app.partners.http import HttpClient

STATEMENT_SECONDS = 120.0  # a few statements read a whole table
POOL_SIZE = 2
SHOWN = 10  # violations of one invariant in the table; `--json` has more
COLORS = {
    VerdictStatus.HOLDS: typer.colors.GREEN,
    VerdictStatus.VIOLATED: typer.colors.RED,
    VerdictStatus.NOT_CHECKED: typer.colors.YELLOW,
}


def verify(
    *,
    since: Annotated[
        str | None, typer.Option(help="Only orders placed within this time: 90, 15m, 12h or 7d. Default: all.")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check every invariant against tables, broker and partners; changes nothing. Exit 1: violated, 3: not checked."""
    seconds = None if since is None else parse_duration(since, "--since")
    report = asyncio.run(_run(data_dir, Scope(since_seconds=seconds)))
    typer.echo(report.model_dump_json(indent=2) if as_json else format_report(report))
    raise typer.Exit(report.exit_code)


async def _run(data_dir: Path | None, scope: Scope) -> VerifyReport:
    """Run one pass, with a progress bar on a terminal."""
    configured = _load(data_dir)
    url = configured.database_url.get_secret_value()
    await db.check(url)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(db.open_pool(url, POOL_SIZE, STATEMENT_SECONDS))
        broker = make_broker(configured.rabbitmq_url.get_secret_value(), pool, Signals())
        stack.push_async_callback(broker.close)
        http = await stack.enter_async_context(HttpClient())
        access = await find_books(http, configured)
        verifier = make_verifier(pool, broker, queues(), access, make_config(configured))
        with typer.progressbar(length=1, hidden=not sys.stderr.isatty(), file=sys.stderr, label="verifying") as bar:

            def progress(done: int, orders: int) -> None:
                bar.length = max(orders, 1)
                bar.update(done - bar.pos)

            return (await verifier.run(scope, progress)).report()


def _load(data_dir: Path | None) -> settings.Verification:
    """Return the settings of the service; with `data_dir`, those of the demo that runs there."""
    url, _ = servers(data_dir)
    if data_dir is None:
        return settings.load(settings.Verification)
    try:
        sandbox_url = (data_dir / SANDBOX_URL_FILE).read_text()
    except OSError:
        sandbox_url = ""  # the partners' invariants are then not checked
    return settings.load(settings.Verification, **connections(url, sandbox_url))


def format_report(report: VerifyReport) -> str:
    """Return the report as a table, with the violations below their rows."""
    width = max(len(verdict.title) for verdict in report.invariants)
    lines = [f"      {'invariant':<{width}}  {'examined':>9}  result"]
    for verdict in report.invariants:
        lines += _format_verdict(verdict, width)
    lines += ["", _summarize(report)]
    return "\n".join(lines)


def _format_verdict(verdict: InvariantVerdict, width: int) -> list[str]:
    result = typer.style(verdict.status, fg=COLORS[verdict.status], bold=verdict.status is VerdictStatus.VIOLATED)
    count = f" ({verdict.violations:,})" if verdict.violations else ""
    aside = f"  ({verdict.detail})" if verdict.detail and verdict.status is VerdictStatus.HOLDS else ""
    lines = [f"  {verdict.invariant}  {verdict.title:<{width}}  {verdict.examined:>9,}  {result}{count}{aside}"]
    lines += [f"        {example.subject}  {example.problem}" for example in verdict.examples[:SHOWN]]
    if verdict.violations > SHOWN:
        lines.append(f"        and {verdict.violations - SHOWN:,} more")
    if verdict.detail and not aside:
        lines.append(f"        {verdict.detail}")
    return lines


def _summarize(report: VerifyReport) -> str:
    counts = {status: sum(verdict.status is status for verdict in report.invariants) for status in VerdictStatus}
    parts = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    orders = "1 order" if report.orders == 1 else f"{report.orders:,} orders"
    return f"{orders}, {report.took_seconds:.1f} s: {parts}"

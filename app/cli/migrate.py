"""`orders migrate` and `orders prune`: upgrade the schema, and delete rows past their retention."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from app import bootstrap, db, settings
from app.demo import embedded_postgres
from app.errors import Unavailable
from app.observability import logs


def migrate(
    *,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 if the schema is behind.")] = False,
) -> None:
    """Upgrade the database schema to this release."""
    url = settings.load(settings.Database).database_url.get_secret_value()
    logs.configure_logging("console", "WARNING")
    revision = asyncio.run(db.inspect(url))
    if check and db.is_behind(revision):
        typer.echo("the schema is behind this release: run `orders migrate`")
        raise typer.Exit(1)
    if not check:
        db.migrate(url)
    typer.echo("the schema is current")


def prune(
    data_dir: Annotated[Path | None, typer.Option(help="Use the database of the demo in this directory.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Delete rows past their retention, in one pass. The janitor role does the same at intervals.

    Exit 1 when a table could not be pruned, and 3 when Postgres was unavailable for all of them.
    """
    database = {} if data_dir is None else {"database_url": embedded_postgres.running_url(data_dir)}
    logs.configure_logging("console", "CRITICAL")  # each failure is reported below
    removed, failures = uvloop.run(bootstrap.prune(settings.load(settings.Retention, **database)))
    typer.echo(json.dumps(removed) if as_json else "\n".join(f"{rows:>9} {table}" for table, rows in removed.items()))
    for table, error in failures.items():
        typer.echo(f"orders: {table} could not be pruned: {error}", err=True)
    if failures:
        is_unreachable = all(isinstance(error, Unavailable) for error in failures.values())
        raise typer.Exit(3 if is_unreachable and len(failures) == len(removed) else 1)

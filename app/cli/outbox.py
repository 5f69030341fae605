"""`orders outbox`: show pending and parked events, and requeue a parked one."""

import asyncio
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from app.cli.options import AsJson, DataDir, MaybeReason, identify_actor, open_pool, servers
from app.operations import outbox
from app.operations.audit import AuditActor
from app.operations.outbox import OutboxAnswer, OutboxCounts, OutboxRow

app = typer.Typer(
    help="Show and requeue events that are not published yet.", no_args_is_help=True, rich_markup_mode=None
)

DEFAULT_ROWS = 20


@app.command()
def stats(*, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Print how many events are pending, how old the oldest is, and how many are parked."""
    counts = asyncio.run(_read_counts(data_dir))
    typer.echo(counts.model_dump_json() if as_json else _format_counts(counts))


@app.command(name="list")
def list_rows(
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The maximum number of rows.")] = DEFAULT_ROWS,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print events that are not published: parked ones first, then by due time."""
    answer = asyncio.run(_read_rows(data_dir, limit))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    typer.echo(_format_counts(answer))
    for row in answer.rows:
        typer.echo(_format_row(row))


@app.command()
def requeue(
    row_id: Annotated[UUID, typer.Argument(metavar="ID")], *, reason: MaybeReason = None, data_dir: DataDir = None
) -> None:
    """Requeue a parked event: it becomes pending again, with all attempts left."""
    asyncio.run(_requeue(data_dir, row_id, identify_actor(reason)))
    typer.echo(f"{row_id} is pending again")


async def _read_counts(data_dir: Path | None) -> OutboxCounts:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return await outbox.read_counts(pool)


async def _read_rows(data_dir: Path | None, limit: int) -> OutboxAnswer:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return await outbox.read_rows(pool, limit)


async def _requeue(data_dir: Path | None, row_id: UUID, audit_actor: AuditActor) -> None:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        await outbox.requeue(pool, row_id, audit_actor)


def _format_counts(counts: OutboxCounts) -> str:
    oldest = f" (the oldest for {counts.oldest_pending_age_seconds:.1f} s)" if counts.pending else ""
    return f"{counts.pending} pending{oldest}, {counts.parked} parked"


def _format_row(row: OutboxRow) -> str:
    until = f"since {row.parked_at}" if row.parked_at else f"due {row.next_attempt_at}"
    lines = [
        f"\n{row.id}  {row.type}  order {row.order_id}",
        f"  state     {row.state}, {until}, {row.attempts} attempts",
        f"  occurred  {row.occurred_at}",
    ]
    return "\n".join([*lines, f"  reason    {row.reason}"] if row.reason else lines)

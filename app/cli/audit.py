"""`orders audit`: what operators did, newest first."""

import asyncio
import json
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from app.cli.options import AsJson, DataDir, open_pool, parse_duration, servers
from app.operations import audit_views
from app.operations.audit import ActionFilter
from app.operations.audit_views import ActionsAnswer, ActionView

DEFAULT_ACTIONS = 20


def audit(
    *,
    order: Annotated[UUID | None, typer.Option(help="Only actions on this order, or on a message of it.")] = None,
    since: Annotated[str | None, typer.Option(help="Only actions within this time: 90, 15m, 12h or 7d.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The maximum number of actions.")] = DEFAULT_ACTIONS,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print what operators did by route or by command, and why: newest first."""
    wanted = ActionFilter(order, None if since is None else parse_duration(since, "--since"))
    answer = asyncio.run(_read(data_dir, wanted, limit))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    more = ", and there are older ones" if answer.next_cursor else ""
    typer.echo(f"{len(answer.actions)} actions shown{more}")
    for action in answer.actions:
        typer.echo(_format_action(action))


async def _read(data_dir: Path | None, wanted: ActionFilter, limit: int) -> ActionsAnswer:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return await audit_views.read_actions(pool, wanted, limit)


def _format_action(action: ActionView) -> str:
    target = action.target
    lines = [
        f"\n{action.at}  {action.action}: {action.outcome}",
        f"  target    {target.kind}{f' {target.id}' if target.id else ''}",
        f"  actor     {action.actor}",
    ]
    if action.reason:
        lines.append(f"  reason    {action.reason}")
    if action.order_id is not None and action.order_id != target.id:
        lines.append(f"  order     {action.order_id}")
    for name, values in (("selected", action.selection), ("counted", action.counts)):
        if values:
            lines.append(f"  {name:<9} " + ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items()))
    return "\n".join(lines)

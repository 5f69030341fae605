"""`orders partner`: show partners, pause calls to one, resume them.

A change needs a reason, which is recorded with it. Each command may be killed at any time and run again.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from app.api import params
from app.cli.options import AsJson, DataDir, identify_actor, open_pool, servers
from app.errors import PartnerNotFound
from app.operations import partner_views, partners
from app.operations.audit import AuditActor
from app.operations.partner_views import PartnerChanged, PartnersAnswer, PartnerView

app = typer.Typer(help="Show, pause and resume partners.", no_args_is_help=True, rich_markup_mode=None)

PartnerName = Annotated[str, typer.Argument(metavar="NAME", help="inventory, payment or shipping.")]
RequiredReason = Annotated[str, typer.Option(help="The reason, recorded with the action.")]


@app.command(name="list")
def list_partners(*, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Print each partner: whether it is paused, by whom and why, and how many sagas are at its steps."""
    answer = asyncio.run(_list(data_dir))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    for view in answer.partners:
        typer.echo(_format_partner(view))


@app.command()
def pause(
    name: PartnerName,
    *,
    duration: Annotated[str, typer.Option("--for", help="How long: 90, 30m, 12h or 7d.")],
    reason: RequiredReason,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Stop every call to a partner for a time, do and undo. Orders are still taken; deadlines run on."""
    partner, audit_actor = _parse_partner(name), identify_actor(reason)
    try:
        seconds = params.parse_pause(duration)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from error
    _report(asyncio.run(_pause(data_dir, partner, seconds, audit_actor)), as_json=as_json)


@app.command()
def resume(name: PartnerName, *, reason: RequiredReason, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End the pause of a partner now. The sagas that wait for it continue within about a second."""
    partner, audit_actor = _parse_partner(name), identify_actor(reason)
    _report(asyncio.run(_resume(data_dir, partner, audit_actor)), as_json=as_json)


async def _list(data_dir: Path | None) -> PartnersAnswer:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return await partner_views.read_partners(pool)


async def _pause(data_dir: Path | None, partner: str, seconds: float, audit_actor: AuditActor) -> PartnerChanged:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        begun, outcome = await partners.pause(pool, partner, seconds, audit_actor)
        return PartnerChanged.of_pause(begun, outcome, await partners.find_late(pool, partner, begun.ends_at))


async def _resume(data_dir: Path | None, partner: str, audit_actor: AuditActor) -> PartnerChanged:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return PartnerChanged.of_resume(partner, await partners.resume(pool, partner, audit_actor))


def _parse_partner(name: str) -> str:
    try:
        return partners.require(name)
    except PartnerNotFound as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error


def _report(changed: PartnerChanged, *, as_json: bool) -> None:
    typer.echo(changed.model_dump_json(indent=2) if as_json else changed.message)
    if changed.warning is not None and not as_json:
        typer.echo(f"warning: {changed.warning}", err=True)


def _format_partner(view: PartnerView) -> str:
    at_it = f"{view.sagas} unfinished {'saga' if view.sagas == 1 else 'sagas'} at its steps"
    if view.pause is None:
        return f"{view.partner:<10} not paused; {at_it}"
    by = f"by {view.pause.actor} since {view.pause.paused_at}: {view.pause.reason}"
    return f"{view.partner:<10} paused until {view.pause.ends_at}; {at_it}\n           {by}"

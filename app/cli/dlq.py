"""`orders dlq`: show dead letters with their reasons, replay them, purge them.

Each command scans the dead letters that exist when it starts. It may be killed at any time and run again.
"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.api import params
from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import CONSUMERS, queues
from app.cli.options import AsJson, DataDir, MaybeReason, identify_actor, open_pool, parse_duration, servers
from app.errors import OrdersError
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals
from app.operations.audit import AuditActor
from app.operations.dead_letter_views import DeadLettersAnswer, DeadLetterView, TreatedAnswer
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary

app = typer.Typer(help="Show, replay and purge dead letters.", no_args_is_help=True, rich_markup_mode=None)

DEFAULT_PEEKED = 20
DONE = {DeadLetterAction.REPLAY: "replayed", DeadLetterAction.PURGE: "purged"}

QueueOption = Annotated[str, typer.Option(help="The name of a queue, or of its dead-letter queue.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Only dead letters that failed within this time: 90, 15m, 12h or 7d.")
]
LetterIdOption = Annotated[str | None, typer.Option("--id", help="Only the dead letter with this id.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="The maximum number; default: all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; print what would be done.")]


@app.command()
def peek(
    *,
    queue: QueueOption = CONSUMERS[0].queue.name,
    since: SinceOption = None,
    letter_id: LetterIdOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number.")] = DEFAULT_PEEKED,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="No effect: peek never changes anything.")] = False,  # noqa: ARG001 - so that `replay --dry-run` and `peek --dry-run` differ in one word
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print dead letters: the reason, the state in the inbox, and what a replay would do."""
    spec, selection = _find_queue(queue), _parse_selection(since, letter_id, limit)
    summary, findings = asyncio.run(_scan(data_dir, DeadLetterAction.PEEK, spec, selection, None, keep=True))
    answer = DeadLettersAnswer.of(spec.name, summary, findings)
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    typer.echo(f"{summary.depth} dead letters of {spec.name}, {summary.matched} shown")
    for view in answer.dead_letters:
        typer.echo(_format_letter(view))
    _report_rest(selection, summary)


@app.command()
def replay(
    *,
    queue: QueueOption = CONSUMERS[0].queue.name,
    since: SinceOption = None,
    letter_id: LetterIdOption = None,
    limit: LimitOption = None,
    dry_run: DryRun = False,
    reason: MaybeReason = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Send dead letters to their queue again, with all attempts left; none takes effect twice."""
    selection, audit_actor = (
        _parse_selection(since, letter_id, limit),
        _identify_unless_dry_run(reason, dry_run=dry_run),
    )
    _act(DeadLetterAction.REPLAY, _find_queue(queue), selection, audit_actor, data_dir, as_json=as_json)


@app.command()
def purge(
    *,
    queue: QueueOption = CONSUMERS[0].queue.name,
    since: SinceOption = None,
    letter_id: LetterIdOption = None,
    limit: LimitOption = None,
    dry_run: DryRun = False,
    reason: MaybeReason = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove dead letters permanently. `orders saga list` shows an order that waits for one as purged."""
    selection, audit_actor = (
        _parse_selection(since, letter_id, limit),
        _identify_unless_dry_run(reason, dry_run=dry_run),
    )
    _act(DeadLetterAction.PURGE, _find_queue(queue), selection, audit_actor, data_dir, as_json=as_json)


def _act(
    action: DeadLetterAction,
    queue: QueueSpec,
    selection: Selection,
    audit_actor: AuditActor | None,
    data_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    dry_run = audit_actor is None
    summary, findings = asyncio.run(_scan(data_dir, action, queue, selection, audit_actor, keep=dry_run or as_json))
    if as_json:
        answer = TreatedAnswer.of_scan(queue.name, summary, findings, dry_run=dry_run)
        typer.echo(answer.model_dump_json(indent=2))
    else:
        would = "would be " if dry_run else ""
        typer.echo(f"{would}{DONE[action]}: {summary.matched} of {summary.depth} dead letters of {queue.name}")
        for finding in findings if dry_run else ():
            typer.echo(_format_letter(DeadLetterView.of(finding)))
        if summary.from_outbox:
            typer.echo(f"{would}sent again from the outbox: {selection.id}, whose order has not started")
    _report_rest(selection, summary)
    not_all = summary.looked_at < summary.depth and not (selection.limit and summary.matched >= selection.limit)
    not_found = selection.id is not None and not summary.matched
    if (not_found or not_all) and not summary.from_outbox:
        raise typer.Exit(1)


async def _scan(
    data_dir: Path | None,
    action: DeadLetterAction,
    queue: QueueSpec,
    selection: Selection,
    audit_actor: AuditActor | None,
    *,
    keep: bool,
) -> tuple[Summary, list[Finding]]:
    """Scan, with a progress bar on a terminal. Returns the findings only with `keep`."""
    findings: list[Finding] = []
    done = 0

    def collect(finding: Finding) -> None:
        nonlocal done
        done += 1
        if keep:
            findings.append(finding)

    url, broker_url = servers(data_dir)
    async with open_pool(url) as pool:
        with typer.progressbar(length=1, hidden=not sys.stderr.isatty(), file=sys.stderr, label=action) as bar:

            def progress(looked_at: int, depth: int) -> None:
                bar.length = depth
                bar.update(looked_at - bar.pos)

            letters = DeadLetters(pool, queue, make_broker(broker_url, pool, Signals()).dead_letters(queue, pool))
            try:
                return await letters.scan(action, selection, collect, actor=audit_actor, progress=progress), findings
            except OrdersError:
                if done and audit_actor is not None:
                    typer.echo(f"orders: {done} {DONE[action]} before this error; run the command again", err=True)
                raise


def _identify_unless_dry_run(reason: str | None, *, dry_run: bool) -> AuditActor | None:
    """Return the user and the reason; None for a dry run. A bad reason always raises typer.BadParameter."""
    named = identify_actor(reason)
    return None if dry_run else named


def _find_queue(name: str) -> QueueSpec:
    for queue in queues():
        if name in {queue.name, queue.dead_letter_queue}:
            return queue
    names = ", ".join(f"{queue.name} (or {queue.dead_letter_queue})" for queue in queues())
    raise typer.BadParameter(f"must be {names}: no other queue has dead letters", param_hint="--queue")


def _parse_selection(since: str | None, letter_id: str | None, limit: int | None) -> Selection:
    try:
        selected = None if letter_id is None else params.parse_letter_id(letter_id)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--id") from error
    return Selection(selected, None if since is None else parse_duration(since, "--since"), limit)


def _report_rest(selection: Selection, summary: Summary) -> None:
    """Report that a scan stopped early, because it cannot hold more dead letters at a time."""
    if summary.looked_at < summary.depth and summary.matched != selection.limit:
        typer.echo(f"examined only the first {summary.looked_at} of {summary.depth}", err=True)


def _format_letter(view: DeadLetterView) -> str:
    times = [time for time in (view.first_failure_at, view.last_failure_at) if time]
    details = [] if view.attempts is None else ["1 attempt" if view.attempts == 1 else f"{view.attempts} attempts"]
    details += [" to ".join(dict.fromkeys(times))] if times else []
    return "\n".join(
        [
            f"\n{view.id}  {view.type or 'of no type'}  {f'order {view.order_id}' if view.order_id else ''}".rstrip(),
            f"  reason  {view.reason}" + (f" ({', '.join(details)})" if details else ""),
            f"  inbox   {view.inbox}",
            f"  replay  {view.replay}",
        ]
    )

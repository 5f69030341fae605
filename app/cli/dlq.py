"""`orders dlq`: the messages that were given up, why, and what became of them; sent again, or removed.

Each command goes over what is there when it begins, may be killed at any instant, and may be run again.
"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.api import params
from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import CONSUMERS, queues
from app.cli.options import AsJson, DataDir, MaybeReason, actor, duration, open_pool, servers
from app.errors import OrdersError
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals
from app.operations.audit import AuditActor
from app.operations.dead_letter_views import DeadLettersAnswer, DeadLetterView, TreatedAnswer
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary

app = typer.Typer(help="The messages that were given up.", no_args_is_help=True, rich_markup_mode=None)

DEFAULT_PEEKED = 20
DONE = {DeadLetterAction.REPLAY: "replayed", DeadLetterAction.PURGE: "purged"}

QueueOption = Annotated[str, typer.Option(help="The queue that gave them up, or its dead-letter queue.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Only those that failed within this time, as 90, 15m, 12h or 7d.")
]
LetterIdOption = Annotated[str | None, typer.Option("--id", help="Only the one of this id.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many; default: all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; print what would be done.")]


@app.command()
def peek(
    *,
    queue: QueueOption = CONSUMERS[0].queue.name,
    since: SinceOption = None,
    letter_id: LetterIdOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = DEFAULT_PEEKED,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As without: peeking changes nothing.")] = False,  # noqa: ARG001 - so that `replay --dry-run` and `peek --dry-run` differ in one word
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print dead letters: why each was given up, what the inbox knows of it, what a replay would do."""
    spec, selection = _queue(queue), _selection(since, letter_id, limit)
    summary, findings = asyncio.run(_scan(data_dir, DeadLetterAction.PEEK, spec, selection, None, keep=True))
    answer = DeadLettersAnswer.of(spec.name, summary, findings)
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    typer.echo(f"{summary.depth} dead letters of {spec.name}, {summary.matched} shown")
    for view in answer.dead_letters:
        typer.echo(_block(view))
    _tell_of_the_rest(selection, summary)


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
    """Give dead letters their attempts again and send them to their queue; none takes effect twice."""
    selection, who = _selection(since, letter_id, limit), _actor(reason, dry_run=dry_run)
    _treat(DeadLetterAction.REPLAY, _queue(queue), selection, who, data_dir, as_json=as_json)


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
    """Remove dead letters for good. An order that still waits for one is listed as purged."""
    selection, who = _selection(since, letter_id, limit), _actor(reason, dry_run=dry_run)
    _treat(DeadLetterAction.PURGE, _queue(queue), selection, who, data_dir, as_json=as_json)


def _treat(
    action: DeadLetterAction,
    queue: QueueSpec,
    selection: Selection,
    who: AuditActor | None,
    data_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    dry_run = who is None
    summary, findings = asyncio.run(_scan(data_dir, action, queue, selection, who, keep=dry_run or as_json))
    if as_json:
        answer = TreatedAnswer.of_scan(queue.name, summary, findings, dry_run=dry_run)
        typer.echo(answer.model_dump_json(indent=2))
    else:
        would = "would be " if dry_run else ""
        typer.echo(f"{would}{DONE[action]}: {summary.matched} of {summary.depth} dead letters of {queue.name}")
        for finding in findings if dry_run else ():
            typer.echo(_block(DeadLetterView.of(finding)))
        if summary.from_outbox:
            typer.echo(f"{would}sent again from the outbox: {selection.id}, whose order has not started")
    _tell_of_the_rest(selection, summary)
    not_all = summary.looked_at < summary.depth and not (selection.limit and summary.matched >= selection.limit)
    not_found = selection.id is not None and not summary.matched
    if (not_found or not_all) and not summary.from_outbox:
        raise typer.Exit(1)


async def _scan(
    data_dir: Path | None,
    action: DeadLetterAction,
    queue: QueueSpec,
    selection: Selection,
    who: AuditActor | None,
    *,
    keep: bool,
) -> tuple[Summary, list[Finding]]:
    """Scan, with a progress bar on a terminal. Returns the findings only with `keep`."""
    findings: list[Finding] = []
    done = 0

    def found(finding: Finding) -> None:
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

            letters = DeadLetters(pool, queue, make_broker(broker_url, pool, Signals()).dead_letters(queue))
            try:
                return await letters.scan(action, selection, found, actor=who, progress=progress), findings
            except OrdersError:
                if done and who is not None:
                    typer.echo(f"orders: {done} {DONE[action]} before this happened; run it again", err=True)
                raise


def _actor(reason: str | None, *, dry_run: bool) -> AuditActor | None:
    """Return who acts; None for a dry run, which refuses a bad reason too."""
    acting = actor(reason)
    return None if dry_run else acting


def _queue(name: str) -> QueueSpec:
    for queue in queues():
        if name in {queue.name, queue.dead_letter_queue}:
            return queue
    names = ", ".join(f"{queue.name} (or {queue.dead_letter_queue})" for queue in queues())
    raise typer.BadParameter(f"must be {names}: no other queue has dead letters", param_hint="--queue")


def _selection(since: str | None, letter_id: str | None, limit: int | None) -> Selection:
    try:
        selected = None if letter_id is None else params.letter_id(letter_id)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--id") from error
    return Selection(selected, None if since is None else duration(since, "--since"), limit)


def _tell_of_the_rest(selection: Selection, summary: Summary) -> None:
    """Say so when a pass ended before the end: it holds no more at a time."""
    if summary.looked_at < summary.depth and summary.matched != selection.limit:
        typer.echo(f"looked at the first {summary.looked_at} of {summary.depth} only", err=True)


def _block(view: DeadLetterView) -> str:
    times = [time for time in (view.first_failure_at, view.last_failure_at) if time]
    story = [] if view.attempts is None else ["1 attempt" if view.attempts == 1 else f"{view.attempts} attempts"]
    story += [" to ".join(dict.fromkeys(times))] if times else []
    return "\n".join(
        [
            f"\n{view.id}  {view.type or 'of no type'}  {f'order {view.order_id}' if view.order_id else ''}".rstrip(),
            f"  reason  {view.reason}" + (f" ({', '.join(story)})" if story else ""),
            f"  inbox   {view.inbox}",
            f"  replay  {view.replay}",
        ]
    )

"""`orders saga`: list unfinished sagas, show one with its log, retry it, compensate it.

A change needs a reason, which is recorded with it. Each command may be killed at any time and run again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from app import db
from app.api import params
from app.bootstrap.consumers import CONSUMERS
from app.cli.options import AsJson, DataDir, identify_actor, open_pool, servers
from app.operations import saga_views, sagas
from app.operations.saga_views import ListedSaga, SagaAnswer, SagaChanged, SagasAnswer, SagaView, UnstartedOrder
from app.operations.sagas import ActionOutcome, SagaAction
from app.operations.timeline import TimelineEntry
from app.operations.why_stuck import WhyStuck
from app.orders.model import Status

app = typer.Typer(help="Show, retry and compensate sagas.", no_args_is_help=True, rich_markup_mode=None)

DEFAULT_SAGAS = 20

SagaId = Annotated[UUID, typer.Argument(metavar="ID")]
RequiredReason = Annotated[str, typer.Option(help="The reason, recorded with the action.")]


@app.command(name="list")
def list_sagas(
    *,
    status: Annotated[
        str | None, typer.Option(help="Only sagas whose orders have this status: pending, compensating.")
    ] = None,
    stuck: Annotated[
        bool, typer.Option("--stuck", help="Only sagas that need attention: late, or due and not claimed.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The maximum number of sagas.")] = DEFAULT_SAGAS,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print unfinished sagas: those that need attention first, then the oldest first.

    Also print the orders that cannot start, because their event is a dead letter or was purged.
    """
    answer = asyncio.run(_list(data_dir, limit, _parse_status(status), stuck=stuck))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
        return
    typer.echo(f"{len(answer.sagas)} unfinished sagas shown")
    for saga in answer.sagas:
        typer.echo(_format_listed(saga))
    if answer.unstarted:
        typer.echo(f"\n{len(answer.unstarted)} orders shown that cannot start")
    for order in answer.unstarted:
        typer.echo(_format_unstarted(order))


@app.command()
def show(saga_id: SagaId, *, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Print an order's story: every call to a partner, events, operators, and what it waits for."""
    answer = asyncio.run(_show(data_dir, saga_id))
    typer.echo(answer.model_dump_json(indent=2) if as_json else format_details(answer))


@app.command()
def retry(saga_id: SagaId, *, reason: RequiredReason, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Make a waiting saga due now. A saga that a process is running is not changed."""
    audit_actor = identify_actor(reason)

    async def act(pool: db.Pool) -> ActionOutcome:
        return await sagas.retry(pool, saga_id, audit_actor)

    _change(saga_id, SagaAction.RETRY, act, data_dir, as_json=as_json)


@app.command()
def compensate(saga_id: SagaId, *, reason: RequiredReason, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Compensate a saga: undo every step, and never confirm its order. A confirmed order is refused."""
    audit_actor = identify_actor(reason)

    async def act(pool: db.Pool) -> ActionOutcome:
        return await sagas.compensate(pool, saga_id, audit_actor, {})

    _change(saga_id, SagaAction.COMPENSATE, act, data_dir, as_json=as_json)


async def _list(data_dir: Path | None, limit: int, status: str | None, *, stuck: bool) -> SagasAnswer:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        consumer = CONSUMERS[0].queue.consumer
        return await saga_views.read_unfinished(pool, consumer, limit, status, stuck=stuck)


async def _show(data_dir: Path | None, saga_id: UUID) -> SagaAnswer:
    url, _ = servers(data_dir)
    async with open_pool(url) as pool:
        return await saga_views.read_one(pool, saga_id, CONSUMERS[0].queue.consumer)


def _change(
    saga_id: UUID,
    action: SagaAction,
    act: Callable[[db.Pool], Awaitable[ActionOutcome]],
    data_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    async def change() -> ActionOutcome:
        url, _ = servers(data_dir)
        async with open_pool(url) as pool:
            return await act(pool)

    changed = SagaChanged.of(saga_id, action, asyncio.run(change()))
    typer.echo(changed.model_dump_json(indent=2) if as_json else changed.message)


def _parse_status(text: str | None) -> Status | None:
    try:
        return None if text is None else params.parse_unfinished(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--status") from error


def _format_listed(saga: ListedSaga) -> str:
    last = saga.last_outcome or "no call yet"
    status = _add_detail(saga.status, saga.reason)
    return "\n".join(
        [f"\n{saga.order_id}  {status}", *_format_saga(saga), f"  last    {_add_detail(last, saga.last_detail)}"]
    )


def _format_unstarted(order: UnstartedOrder) -> str:
    event = "was purged" if order.event == "purged" else "is a dead letter"
    return "\n".join(
        [
            f"\n{order.order_id}  pending",
            f"  age     {order.age_seconds:.1f} s",
            f"  event   {event}, since {order.since}, {order.attempts} attempts",
            *([f"  reason  {order.reason}"] if order.reason else []),
        ]
    )


def format_details(answer: SagaAnswer) -> str:
    """Return an order's story as lines for a terminal."""
    reason = answer.status_reason if answer.saga is None else answer.saga.reason
    order = f"{_add_detail(answer.status, reason)}, version {answer.version}"
    lines = [f"{answer.order_id}  {order}, placed {answer.placed_at}"]
    if answer.saga is None:
        lines.append("  saga    none: it has not started, or was removed after its retention")
    else:
        lines += _format_saga(answer.saga)
    if ids := {name: value for line in answer.log for name, value in (line.reply or {}).items()}:
        lines.append("  ids     " + ", ".join(f"{name} {value}" for name, value in ids.items()))
    day = answer.placed_at[:10]
    if answer.why_stuck is not None:
        lines += _format_why_stuck(answer.why_stuck, day)
    return "\n".join([*lines, "", *(_format_entry(entry, day) for entry in answer.timeline)])


def _format_why_stuck(why: WhyStuck, day: str) -> list[str]:
    again = f", next attempt {_time_of(why.next_attempt_at, day)}" if why.next_attempt_at else ""
    return [f"  waits   for {why.waiting_for} since {_time_of(why.since, day)}{again}", f"          {why.message}"]


def _format_entry(entry: TimelineEntry, day: str) -> str:
    """Return one line: time, what happened, how long it took, and its outcome."""
    attempt = f" #{entry.attempt}" if entry.attempt and entry.attempt > 1 else ""
    what = f"{entry.event} {entry.step}{attempt}" if entry.step else entry.event.replace("-", " ")
    took = "" if entry.seconds is None else f"{entry.seconds * 1000:,.0f} ms"
    outcome = _add_detail(entry.outcome or "", entry.detail) if entry.outcome else entry.detail or ""
    return f"  {_time_of(entry.at, day):<14} {entry.source:<9} {what:<26} {took:>9}  {outcome}".rstrip()


def _time_of(instant: str | None, day: str) -> str:
    """Return the time of day, which is what one compares; with the date if it is not the day of the order."""
    if instant is None:
        return ""
    return instant[11:23] if instant.startswith(day) else f"{instant[5:10]} {instant[11:19]}"


def _format_saga(saga: SagaView) -> list[str]:
    step = "nothing left to do" if saga.step is None else f"{saga.step}, {saga.attempts} attempts"
    return [
        f"  age     {saga.age_seconds:.1f} s, deadline {saga.deadline_at}{', stuck' if saga.stuck else ''}",
        f"  step    {saga.direction}: {step}",
        f"  next    {_format_next(saga)}",
    ]


def _format_next(saga: SagaView) -> str:
    seconds = saga.next_attempt_in_seconds
    if seconds is None:
        return "it has ended"
    if seconds <= 0:
        return f"due for {-seconds:.1f} s" + (f", abandoned by {saga.lease_owner}" if saga.lease_owner else "")
    return (
        f"running on {saga.lease_owner}, lease ends in {seconds:.1f} s" if saga.lease_owner else f"in {seconds:.1f} s"
    )


def _add_detail(text: str, detail: str | None) -> str:
    return f"{text} ({detail})" if detail else text

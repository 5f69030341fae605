"""Dead letters, for operators: what was given up and why, what a replay would do, replaying, removing.

They are where the transport leaves them: in RabbitMQ's dead-letter queue, or, with the in-process transport, as parked
outbox rows of the types that have a handler. A pass goes over what is there when it begins, not over what comes back
meanwhile, and may be killed at any instant and run again:

    replay: rearm the inbox rows → commit → publish, confirmed → remove
    purge:  record as purged in the inbox what an order still waits for → commit → remove

- rearmed, not published: the message is still a dead letter, of which the inbox has forgotten the failures;
- published, not removed: there are two copies; the inbox lets one take effect;
- recorded, not removed: the dead letter is still there, and only an operator sends it again, as was decided;
- in-process, the outbox row is changed in the same transaction: there is nothing between.

If no dead letter has the id to replay, the event is sent from the outbox, which keeps it until its order has ended.
Operators' actions are recorded (`audit`) before the first step.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from app import db
from app.messaging import inbox, outbox_admin
from app.messaging.rabbitmq import dead_letters
from app.messaging.rabbitmq.dead_letters import DeadLetter
from app.operations import audit
from app.operations.audit import Operator
from app.saga import maintenance

BATCH = 100  # dead letters looked up, rearmed and published together

Checkpoint = Callable[[str], None]


class Action(StrEnum):
    """What a pass does with each dead letter that is meant."""

    PEEK = "peek"
    REPLAY = "replay"
    PURGE = "purge"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which are meant: those of one id, those that failed last so recently, so many of them; None: all."""

    id: str | None = None
    since_seconds: float | None = None
    limit: int | None = None

    def means(self, letter: DeadLetter, now: datetime) -> bool:
        """Tell whether this one is meant, whatever the limit. One that does not say when it failed is not recent.

        `now` is by Postgres's clock, as is the time of a failure that the inbox has counted.
        """
        if self.id is not None and not {self.id, str(self.order_id or self.id)} & {letter.id, letter.event_id}:
            return False
        if self.since_seconds is None:
            return True
        earliest = now - timedelta(seconds=self.since_seconds)
        return letter.last_failure_at is not None and letter.last_failure_at >= earliest

    @property
    def order_id(self) -> UUID | None:
        """Return `id` as an order's, if it can be one: `order.placed` has the id of its order."""
        return as_uuid(self.id)


@dataclass(frozen=True, slots=True)
class Finding:
    """A dead letter that is meant, and what the inbox knows of it."""

    letter: DeadLetter
    record: inbox.Record | None

    @property
    def verdict(self) -> str:
        """What the inbox says."""
        if self.letter.event_id is None:
            return "unreadable"
        if self.record is None:
            return "never seen"
        if self.record.processed_at is not None:
            return f"took effect at {_second(self.record.processed_at)}"
        if self.record.purged_at is not None:
            return f"purged at {_second(self.record.purged_at)}, but this copy was not removed"
        if not self.record.attempts:
            return "rearmed" + (f", last error: {self.record.last_error}" if self.record.last_error else "")
        times = "once" if self.record.attempts == 1 else f"{self.record.attempts} times"
        return f"failed {times}, last error: {self.record.last_error}"

    @property
    def replay(self) -> str:
        """What a replay would do."""
        if self.letter.event_id is None:
            return "is tried again, and set aside again unless the running release can read it"
        if self.record is not None and self.record.processed_at is not None:
            return "nothing happens a second time: it is acknowledged without effect"
        return "is tried again, with all attempts"


@dataclass(frozen=True, slots=True)
class Summary:
    """`depth`: dead letters at the beginning. `looked_at`: how many of them this pass came to.

    `from_outbox`: none of them has the id to replay, and the event is sent again from the outbox.
    """

    depth: int
    looked_at: int = 0
    meant: int = 0
    from_outbox: bool = False


class Pass(Protocol):
    """One pass over the dead letters that were there when it began: `depth` of them."""

    depth: int

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return the next ones, up to `limit`; none at the end."""

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Have some of those last taken handled again."""

    async def purge(self, letters: Sequence[DeadLetter]) -> None:
        """Remove some of those last taken, for good."""


class Place(Protocol):
    """Where the transport leaves dead letters."""

    def opened(self) -> contextlib.AbstractAsyncContextManager[Pass]:
        """Begin a pass."""


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """The dead letters of one consumer."""

    pool: db.Pool
    consumer: str
    place: Place

    async def go_over(
        self,
        action: Action,
        selection: Selection,
        found: Callable[[Finding], None],
        *,
        operator: Operator | None = None,
        looked: Callable[[int, int], None] = lambda _looked_at, _depth: None,
    ) -> Summary:
        """Do it to each that is meant, and tell `found` of it when it is done; `looked` hears how far the pass is.

        `operator`: who acts; this is recorded. None: a dry run, which changes nothing.
        Raises BrokerUnavailable, DatabaseUnavailable and DeadLettersBusy; what was told of by then is done.
        """
        async with self._on_record(action, selection, operator) as counts, self.place.opened() as one:
            summary = Summary(one.depth)
            while selection.limit is None or summary.meant < selection.limit:
                taken = await one.take(
                    BATCH if selection.limit is None else min(BATCH, selection.limit - summary.meant)
                )
                if not taken:
                    break
                findings = await self._treat(one, action, selection, taken, dry_run=operator is None)
                for each in findings:
                    found(each)
                summary = _sum(summary, taken, findings)
                counts.update(asdict(summary))
                looked(summary.looked_at, summary.depth)
            if action is Action.REPLAY and not summary.meant:
                from_outbox = await self._replay_from_outbox(selection, dry_run=operator is None)
                summary = replace(summary, from_outbox=from_outbox)
            counts.update(asdict(summary))
        return summary

    def _on_record(
        self, action: Action, selection: Selection, operator: Operator | None
    ) -> contextlib.AbstractAsyncContextManager[dict[str, int]]:
        if operator is None:
            return contextlib.nullcontext({})
        selected = {name: value for name, value in asdict(selection).items() if value is not None}
        return audit.on_record(self.pool, operator, f"dlq {action}", selection.order_id, selected)

    async def _treat(
        self, one: Pass, action: Action, selection: Selection, taken: Sequence[DeadLetter], *, dry_run: bool
    ) -> list[Finding]:
        findings = await self._findings(taken, selection)
        if findings and not dry_run:
            await self._do(one, action, [each.letter for each in findings])
        return findings

    async def _replay_from_outbox(self, selection: Selection, *, dry_run: bool) -> bool:
        """Make the event pending again, with all attempts, if it is one whose order has not started."""
        order_id = selection.order_id
        if order_id is None or selection.since_seconds is not None:
            return False  # not an order's id, or the dead letter may be older than `since`
        async with db.transaction(self.pool) as conn:
            unstarted = await maintenance.still_unstarted(conn, [order_id])
            needed = bool(unstarted) and await outbox_admin.exists(conn, order_id)
            if needed and not dry_run:
                await inbox.rearm(conn, self.consumer, [str(order_id)])
                await outbox_admin.send_again(conn, order_id)
        return needed

    async def _findings(self, taken: Sequence[DeadLetter], selection: Selection) -> list[Finding]:
        async with db.connection(self.pool) as conn:
            now = await db.now(conn)
            letters = [letter for letter in taken if selection.means(letter, now)]
            ids = {letter.event_id for letter in letters if letter.event_id is not None}
            records = await inbox.look_up(conn, self.consumer, ids) if ids else {}
        return [Finding(letter, records.get(letter.event_id or "")) for letter in letters]

    async def _do(self, one: Pass, action: Action, letters: Sequence[DeadLetter]) -> None:
        match action:
            case Action.PEEK:
                pass
            case Action.REPLAY:
                await one.replay(letters)
            case Action.PURGE:
                await one.purge(letters)


@dataclass(frozen=True, slots=True)
class InQueue:
    """RabbitMQ's dead-letter queue."""

    pool: db.Pool
    consumer: str
    url: str
    routing_keys: Collection[str]
    checkpoint: Checkpoint

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator["_QueuePass"]:
        """Begin a pass."""
        async with dead_letters.opened(self.url, self.routing_keys) as messages:
            yield _QueuePass(self, messages)


class _QueuePass:
    def __init__(self, place: InQueue, messages: dead_letters.QueuePass) -> None:
        self.depth = messages.depth
        self.take = messages.take
        self._place = place
        self._messages = messages

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        await self._rearm(letters)
        self._place.checkpoint("dlq.rearmed")
        refusals = await self._messages.publish_again(letters)
        self._place.checkpoint("dlq.published")
        await self._messages.remove([each for each, refusal in zip(letters, refusals, strict=True) if refusal is None])
        for refusal in refusals:
            if refusal is not None:
                raise refusal

    async def purge(self, letters: Sequence[DeadLetter]) -> None:
        events = {UUID(letter.event_id) for letter in letters if letter.event_id is not None}
        async with db.transaction(self._place.pool) as conn:
            await record_purge(conn, self._place.consumer, events)
        self._place.checkpoint("dlq.recorded")
        await self._messages.remove(letters)

    async def _rearm(self, letters: Sequence[DeadLetter]) -> None:
        ids = {letter.event_id for letter in letters if letter.event_id is not None}
        async with db.transaction(self._place.pool) as conn:
            await inbox.rearm(conn, self._place.consumer, ids)


async def record_purge(conn: db.Connection, consumer: str, events: Collection[UUID]) -> None:
    """Record which of these events their orders still wait for, else `lost_letters` would send them again."""
    needed = await maintenance.still_unstarted(conn, events)
    await inbox.purged(conn, consumer, [str(order_id) for order_id in needed])


def as_uuid(text: str | None) -> UUID | None:
    """Parse a text; None if it is not a UUID."""
    try:
        return UUID(text or "")
    except ValueError:
        return None


def _second(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="seconds")


def _sum(summary: Summary, taken: Sequence[DeadLetter], findings: Sequence[Finding]) -> Summary:
    return replace(
        summary,
        looked_at=summary.looked_at + len(taken),
        meant=summary.meant + len(findings),
    )

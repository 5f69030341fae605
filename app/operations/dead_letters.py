"""Dead letters, for operators: what was given up and why, what a replay would do, replaying, removing.

They are where the transport leaves them: in RabbitMQ's dead-letter queue, or, with the in-process transport, as parked
outbox rows of the types that have a handler. A pass goes over what is there when it begins, not over what comes back
meanwhile, and may be killed at any instant and run again:

    rearm the inbox rows → commit → publish, confirmed → remove

- committed, not published: the message is still a dead letter, of which the inbox has forgotten the failures;
- published, not removed: there are two copies; the inbox lets one take effect;
- in-process, the outbox row goes back to pending in the transaction that rearms: there is nothing between.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from app import db
from app.messaging import dead_letters, inbox
from app.messaging.dead_letters import DeadLetter

BATCH = 100  # dead letters looked up, rearmed and published together
NEEDED = "its order has not started and would wait for ever: replay it, or cancel the order"

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

    def means(self, letter: DeadLetter) -> bool:
        """Tell whether this one is meant, whatever the limit. One that does not say when it failed is not recent."""
        if self.id is not None and self.id not in {letter.id, letter.event_id}:
            return False
        if self.since_seconds is None:
            return True
        earliest = datetime.now(UTC) - timedelta(seconds=self.since_seconds)
        return letter.last_failure_at is not None and letter.last_failure_at >= earliest


@dataclass(frozen=True, slots=True)
class Finding:
    """A dead letter that is meant; what the inbox knows of it; why it was kept, if it was to be removed and was not."""

    letter: DeadLetter
    record: inbox.Record | None
    kept: str | None = None

    @property
    def verdict(self) -> str:
        """What the inbox says."""
        if self.letter.event_id is None:
            return "unreadable"
        if self.record is None:
            return "never seen"
        if self.record.processed_at is not None:
            return f"took effect at {self.record.processed_at.astimezone(UTC).isoformat(timespec='seconds')}"
        if not self.record.attempts:
            return f"rearmed, last error: {self.record.last_error}"
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
    """`depth`: dead letters at the beginning. `looked_at`: how many of them this pass came to. `kept`: not removed."""

    depth: int
    looked_at: int
    meant: int
    kept: int


class Pass(Protocol):
    """One pass over the dead letters that were there when it began: `depth` of them."""

    depth: int

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return the next ones, up to `limit`; none at the end."""

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Have some of those last taken handled again."""

    async def needed(self, letters: Sequence[DeadLetter]) -> set[int]:
        """Return the numbers of those that must not be removed."""

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
        dry_run: bool = False,
        looked: Callable[[int, int], None] = lambda _looked_at, _depth: None,
    ) -> Summary:
        """Do it to each that is meant, and tell `found` of it when it is done; `looked` hears how far the pass is.

        Raises BrokerUnavailable, DatabaseUnavailable and DeadLettersBusy; what was told of by then is done.
        """
        looked_at = meant = kept = 0
        async with self.place.opened() as one:
            while selection.limit is None or meant < selection.limit:
                taken = await one.take(BATCH if selection.limit is None else min(BATCH, selection.limit - meant))
                if not taken:
                    break
                findings = await self._findings([letter for letter in taken if selection.means(letter)])
                if findings and action is Action.PURGE:
                    findings = await self._marked(one, findings)
                if findings and not dry_run:
                    await self._do(one, action, [each.letter for each in findings if each.kept is None])
                for each in findings:
                    found(each)
                looked_at += len(taken)
                meant += len(findings)
                kept += sum(each.kept is not None for each in findings)
                looked(looked_at, one.depth)
            return Summary(one.depth, looked_at, meant, kept)

    async def _findings(self, letters: Sequence[DeadLetter]) -> list[Finding]:
        ids = {letter.event_id for letter in letters if letter.event_id is not None}
        async with db.connection(self.pool) as conn:
            records = await inbox.look_up(conn, self.consumer, ids) if ids else {}
        return [Finding(letter, records.get(letter.event_id or "")) for letter in letters]

    async def _marked(self, one: Pass, findings: Sequence[Finding]) -> list[Finding]:
        needed = await one.needed([each.letter for each in findings])
        return [
            Finding(each.letter, each.record, NEEDED if each.letter.number in needed else None) for each in findings
        ]

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

    async def needed(self, _: Sequence[DeadLetter]) -> set[int]:
        """Return none: the outbox keeps the event."""
        return set()

    async def purge(self, letters: Sequence[DeadLetter]) -> None:
        """Remove; rearmed before, since the janitor sends again only what the inbox does not call dead."""
        await self._rearm(letters)
        await self._messages.remove(letters)

    async def _rearm(self, letters: Sequence[DeadLetter]) -> None:
        ids = {letter.event_id for letter in letters if letter.event_id is not None}
        async with db.transaction(self._place.pool) as conn:
            await inbox.rearm(conn, self._place.consumer, ids)


def as_uuid(text: str | None) -> UUID | None:
    """Parse a text; None if it is not a UUID."""
    try:
        return UUID(text or "")
    except ValueError:
        return None

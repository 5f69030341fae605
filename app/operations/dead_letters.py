"""Dead letters, for operators: list them with the effect of a replay, replay them, purge them.

A scan covers the dead letters that are there when it starts. It may be killed at any point and repeated (see
`messaging.rabbitmq.dead_letters` for its crash points). If no dead letter has the id to replay, the event is sent from
the outbox, which keeps it until its order is final. Each replay and purge is recorded (`audit`) before it starts.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from uuid import UUID

from app import db
from app.messaging import inbox, outbox_admin
from app.messaging.dead_letters import DeadLetter, DeadLetterScan, DeadLetterSource
from app.messaging.topology import QueueSpec
from app.operations import audit
from app.operations.audit import AuditActor
from app.saga import queries
from app.values import immutable

BATCH = 100  # dead letters looked up and processed together


class DeadLetterAction(StrEnum):
    """What a scan does with each matching dead letter."""

    PEEK = "peek"
    REPLAY = "replay"
    PURGE = "purge"


@immutable
class Selection:
    """Which dead letters match: by id, by the age of the last failure, up to a limit. None: no condition."""

    id: str | None = None
    since_seconds: float | None = None
    limit: int | None = None

    def matches(self, letter: DeadLetter, now: datetime) -> bool:
        """Return whether the letter matches, apart from the limit. Without a time of failure, it is not recent.

        `now` is by Postgres's clock, as are the failure times from the inbox.
        """
        if self.id is not None and not {self.id, str(self.order_id or self.id)} & {letter.id, letter.event_id}:
            return False
        if self.since_seconds is None:
            return True
        earliest = now - timedelta(seconds=self.since_seconds)
        return letter.last_failure_at is not None and letter.last_failure_at >= earliest

    @property
    def order_id(self) -> UUID | None:
        """Return `id` as an order's id, if it is a UUID: `order.placed` has the id of its order."""
        return as_uuid(self.id)


@immutable
class Finding:
    """A matching dead letter, with its inbox row."""

    letter: DeadLetter
    record: inbox.InboxRecord | None

    @property
    def inbox_state(self) -> str:
        """The state of the inbox row, as text for operators."""
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
    def replay_effect(self) -> str:
        """What a replay would do, as text for operators."""
        if self.letter.event_id is None:
            return "is tried again, and set aside again unless the running release can read it"
        if self.record is not None and self.record.processed_at is not None:
            return "nothing happens a second time: it is acknowledged without effect"
        return "is tried again, with all attempts"


@immutable
class Summary:
    """`depth`: dead letters at the start. `looked_at`: how many were scanned. `matched`: how many of these matched.

    `from_outbox`: no dead letter has the id to replay, so the event is sent again from the outbox.
    """

    depth: int
    looked_at: int = 0
    matched: int = 0
    from_outbox: bool = False


@immutable
class DeadLetters:
    """The dead letters of one queue."""

    pool: db.Pool
    queue: QueueSpec
    source: DeadLetterSource

    async def scan(
        self,
        action: DeadLetterAction,
        selection: Selection,
        found: Callable[[Finding], None],
        *,
        actor: AuditActor | None = None,
        progress: Callable[[int, int], None] = lambda _looked_at, _depth: None,
    ) -> Summary:
        """Apply `action` to every matching dead letter, then call `found` with it. `actor` None: a dry run.

        `progress` gets how many were scanned, and the depth. Raises BrokerUnavailable, DatabaseUnavailable and
        DeadLettersBusy; letters that were already passed to `found` are done.
        """
        async with self._recorded(action, selection, actor) as command, self.source.scan() as scan:
            summary = Summary(scan.depth)
            while selection.limit is None or summary.matched < selection.limit:
                left = BATCH if selection.limit is None else selection.limit - summary.matched
                letters = await scan.take(BATCH if selection.id is not None else min(BATCH, left))
                if not letters:
                    break
                findings = (await self._findings(letters, selection))[:left]
                if findings and actor is not None:
                    await self._apply(scan, action, [finding.letter for finding in findings])
                for finding in findings:
                    found(finding)
                summary = replace(
                    summary,
                    looked_at=summary.looked_at + len(letters),
                    matched=summary.matched + len(findings),
                )
                command.counts.update(asdict(summary))
                progress(summary.looked_at, summary.depth)
            if action is DeadLetterAction.REPLAY and not summary.matched:
                from_outbox = await self._replay_from_outbox(selection, dry_run=actor is None)
                summary = replace(summary, from_outbox=from_outbox)
            command.counts.update(asdict(summary))
            if not summary.matched and not summary.from_outbox:
                command.outcome = audit.NOTHING_MATCHED
        return summary

    def _recorded(
        self, action: DeadLetterAction, selection: Selection, actor: AuditActor | None
    ) -> contextlib.AbstractAsyncContextManager[audit.CommandRecord]:
        if actor is None:
            return contextlib.nullcontext(audit.CommandRecord())
        selected = {name: value for name, value in asdict(selection).items() if value is not None}
        return audit.on_record(self.pool, actor, f"dlq {action}", selection.order_id, selected)

    async def _findings(self, letters: Sequence[DeadLetter], selection: Selection) -> list[Finding]:
        async with db.connection(self.pool) as conn:
            now = await db.now(conn)
            matching = [letter for letter in letters if selection.matches(letter, now)]
            ids = {letter.event_id for letter in matching if letter.event_id is not None}
            records = await inbox.look_up(conn, self.queue.consumer, ids) if ids else {}
        return [Finding(letter, records.get(letter.event_id or "")) for letter in matching]

    async def _apply(self, scan: DeadLetterScan, action: DeadLetterAction, letters: Sequence[DeadLetter]) -> None:
        match action:
            case DeadLetterAction.PEEK:
                pass
            case DeadLetterAction.REPLAY:
                await scan.replay(letters)
            case DeadLetterAction.PURGE:
                await scan.purge(letters, await self._awaited_events(letters))

    async def _awaited_events(self, letters: Sequence[DeadLetter]) -> set[str]:
        """Return the events whose orders have not started: the inbox records their purge, so they are not resent."""
        events = {UUID(letter.event_id) for letter in letters if letter.event_id is not None}
        async with db.connection(self.pool) as conn:
            return {str(order_id) for order_id in await queries.find_unstarted(conn, events)}

    async def _replay_from_outbox(self, selection: Selection, *, dry_run: bool) -> bool:
        """If the order has not started, make its event pending again with all its attempts. Return whether it was."""
        order_id = selection.order_id
        if order_id is None or selection.since_seconds is not None:
            return False  # no order has this id, or the dead letter may be older than `since_seconds`
        async with db.transaction(self.pool) as conn:
            unstarted = await queries.find_unstarted(conn, [order_id])
            found = bool(unstarted) and await outbox_admin.exists(conn, order_id)
            if found and not dry_run:
                await inbox.reset_attempts(conn, self.queue.consumer, [str(order_id)])
                await outbox_admin.send_again(conn, order_id)
        return found


def as_uuid(text: str | None) -> UUID | None:
    """Parse a text; return None if it is not a UUID."""
    try:
        return UUID(text or "")
    except ValueError:
        return None


def _second(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="seconds")

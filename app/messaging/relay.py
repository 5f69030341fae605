"""The relay: publishes outbox rows to the broker, at least once and in order per subject.

    connect → claim (a short transaction) → publish and confirm (no transaction) → record (guarded by the claim's token)

Where the process may die, and who recovers:

- before the claim commits: nothing happened;
- claimed, not published: the lease ends, and any relay claims the row again;
- published, not recorded: the same, so the message is sent twice with the same id; the inbox drops the duplicate;
- frozen past its lease, then resumed: its token no longer matches, so it records nothing;
- stopped by SIGTERM: it finishes its batch, or is cancelled, records what was confirmed and releases the other rows.

An outage does not use up attempts. While the broker is unavailable, the relay claims nothing and backs off. It releases
rows that were not confirmed within its share of the lease; the next batch is only as large as the number that was
confirmed, and doubles from there. Only a refusal of one row uses up that row's attempts: a nack, or a return because no
queue accepted the message. After `max_attempts`, the row is parked with the reason until an operator decides.
"""

import asyncio
import enum
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID, uuid4

import structlog

from app import db
from app.claim_hint import START, ClaimHint
from app.errors import BrokerUnavailable, DatabaseUnavailable, Unavailable
from app.loops import Backoff
from app.messaging import outbox
from app.messaging.envelope import Envelope
from app.messaging.facts import BatchFailed, MessageParked, MessagePublished, MessageRefused
from app.messaging.spans import RABBITMQ, UNKNOWN, PublishSpans
from app.observability import log_fields
from app.observability.signals import Signals
from app.observability.traces import trace_context
from app.values import immutable

log = structlog.get_logger(__name__)

LEASE_SHARE = 0.9  # of the lease is for publishing; the rest is for recording the results
RELEASE_WAIT_SECONDS = 1.0  # for a connection; without one, the rows stay claimed until their lease ends


@immutable
class Refusal:
    """The broker refused one message. `returned`: no queue accepted it. `final`: retrying cannot help."""

    reason: str
    returned: bool = False
    final: bool = False


class _Unknown(enum.Enum):
    UNCONFIRMED = "unconfirmed"


UNCONFIRMED = _Unknown.UNCONFIRMED  # not sent, or not confirmed: send it again, with the same id
PublishResult = Refusal | Literal[_Unknown.UNCONFIRMED] | None  # None: confirmed


class Transport(Protocol):
    """Where the relay publishes."""

    async def ready(self) -> None:
        """Connect if necessary. Raises Unavailable when nothing can be published."""

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float, results: list[PublishResult]
    ) -> Sequence[PublishResult]:
        """Publish for up to `seconds`; send nothing later. Return `results`, one for each envelope.

        `results` is filled as results arrive, so a cancelled caller has them too. A refusal says that this message can
        never be accepted, or that no queue took it; anything else, unknown errors included, leaves it unconfirmed, or
        raises Unavailable when every message is.
        """


@immutable
class RelayConfig:
    """`batch_size`: rows in one claim. `max_attempts`: refusals of a row before it is parked.

    `messaging_system`: the name of the transport in spans.
    """

    batch_size: int
    lease_seconds: float
    backoff: Backoff
    max_attempts: int
    messaging_system: str = RABBITMQ


class Relay:
    """One relay. Any number may run, in one process or in several."""

    def __init__(self, pool: db.Pool, transport: Transport, config: RelayConfig, signals: Signals) -> None:
        self._pool = pool
        self._transport = transport
        self._config = config
        self._signals = signals
        self._limit = config.batch_size  # adapts to the capacity of the transport
        self._hint = ClaimHint()
        self._outage: BrokerUnavailable | None = None

    def check(self) -> None:
        """Raise BrokerUnavailable if the last batch could not be published, or the broker could not be reached."""
        if self._outage is not None:
            raise self._outage

    async def run_once(self, since: datetime = START) -> int:
        """Publish one batch of rows that became due at `since` or later. Returns how many rows were claimed.

        Raises Unavailable while the broker is down.
        """
        try:
            claimed = await self._publish_batch(since)
        except BrokerUnavailable as error:
            self._outage, self._limit = error, 1
            raise
        self._outage = None
        return claimed

    async def run_batch(self) -> bool:
        """Publish one batch, starting at the hint, for a loop. Return whether more rows are due now, as far as it saw.

        A claim that returned fewer rows than its limit has seen every row that was due. Rows that became due since then
        wake the loop, and the few of which nothing in this process knows wait for its poll: a retry, an event that
        another process wrote, an event that waited behind an earlier one of the same subject.
        """
        limit = self._limit
        claimed = await self.run_once(self._hint.since())
        return claimed == limit or self._limit < limit  # the limit falls when rows were released unconfirmed

    async def _publish_batch(self, since: datetime) -> int:
        await self._transport.ready()  # before the claim, since connecting could use up the lease
        token, claimed_at = uuid4(), time.monotonic()
        async with db.connection(self._pool) as conn:
            rows = await outbox.claim(conn, token, self._limit, self._config.lease_seconds, since)
        self._hint.record(row.due_at for row in rows)
        if not rows:
            return 0
        self._signals.crash_point("relay.claimed")
        seconds = self._config.lease_seconds * LEASE_SHARE - (time.monotonic() - claimed_at)
        results: list[PublishResult] = [UNCONFIRMED] * len(rows)
        spans = PublishSpans(rows, self._signals, self._config.messaging_system)
        try:
            await self._transport.publish(spans.envelopes, seconds, results)
        except asyncio.CancelledError:  # this process is ending: another relay need not wait for the lease
            await self._record_quickly(token, rows, results)
            raise
        except Unavailable:
            self._signals.emit(BatchFailed(len(rows)))
            await self._release(token, rows)
            raise
        finally:
            spans.end([_error_of(result) for result in results])
        self._signals.crash_point("relay.published")
        await self._record(token, rows, results)
        return len(rows)

    async def _record_quickly(
        self, token: UUID, rows: Sequence[outbox.ClaimedRow], results: Sequence[PublishResult]
    ) -> None:
        """Record as `_record` does, but do not wait long for a connection, and never raise."""
        try:
            await self._record(token, rows, results, RELEASE_WAIT_SECONDS)
        except DatabaseUnavailable as error:
            log.warning("relay.not_released", error=str(error), until="the lease ends")

    async def _record(
        self,
        token: UUID,
        rows: Sequence[outbox.ClaimedRow],
        results: Sequence[PublishResult],
        wait_seconds: float | None = None,
    ) -> None:
        """Record what is known of each row, and release the others. `wait_seconds`: for a connection; None: the pool's.

        Raises DatabaseUnavailable.
        """
        known = [(row, result) for row, result in zip(rows, results, strict=True) if result is not UNCONFIRMED]
        if known:
            records = [self._record_of(row, result) for row, result in known]
            async with db.connection(self._pool, wait_seconds) as conn:
                ours = await outbox.record_results(conn, token, records)
            for (row, result), record in zip(known, records, strict=True):
                if result is None and record.id in ours:
                    self._signals.emit(MessagePublished(record.id))
                else:
                    self._report_problem(row, result, record, is_ours=record.id in ours)
        if len(known) == len(rows):
            self._limit = min(self._config.batch_size, self._limit * 2)
        else:
            self._limit = max(1, len(known))
            await self._release(
                token, [row for row, result in zip(rows, results, strict=True) if result is UNCONFIRMED]
            )

    def _record_of(self, row: outbox.ClaimedRow, refusal: Refusal | None) -> outbox.PublishRecord:
        if refusal is None:
            return outbox.PublishRecord(row.envelope.id)
        attempt = row.attempts + 1
        is_last = refusal.final or attempt >= self._config.max_attempts
        pause = None if is_last else self._config.backoff.pause(attempt)
        return outbox.PublishRecord(row.envelope.id, refusal.reason, pause)

    def _report_problem(
        self, row: outbox.ClaimedRow, refusal: Refusal | None, record: outbox.PublishRecord, *, is_ours: bool
    ) -> None:
        """Report a refusal, or that the lease was lost, as part of the event's trace."""
        trace = {"traceparent": row.envelope.traceparent, "tracestate": row.envelope.tracestate}
        with trace_context(trace), log_fields.bound(**row.envelope.log_fields()):
            if refusal is None or not is_ours:
                log.warning("relay.lease_lost")
                return
            kind = MessageParked if record.retry_in_seconds is None else MessageRefused
            self._signals.emit(
                kind(row.envelope.id, row.envelope.subject, row.attempts + 1, refusal.reason, refusal.returned)
            )

    async def _release(self, token: UUID, rows: Sequence[outbox.ClaimedRow]) -> None:
        try:
            async with db.connection(self._pool, RELEASE_WAIT_SECONDS) as conn:
                released = await outbox.release(conn, token, [row.envelope.id for row in rows])
            if released < len(rows):
                log.warning("relay.lease_lost", rows=len(rows) - released)
        except DatabaseUnavailable as error:
            log.warning("relay.not_released", error=str(error), until="the lease ends")


def _error_of(result: PublishResult) -> str | None:
    """Return what a publish span says about the result."""
    if result is UNCONFIRMED:
        return UNKNOWN
    return None if result is None else result.reason

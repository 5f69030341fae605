"""The consumer: each message takes effect exactly once, whatever the transport delivers, in whatever order, how often.

    one transaction: inbox row, the handler's effect → commit → (the transport acknowledges)

Where it may die, and who recovers:

- before the commit: nothing happened, the transport delivers again;
- committed, not acknowledged: delivered again, the inbox row says so, nothing happens twice;
- two deliveries at once: the second waits at the inbox row's primary key and then finds the first one's effect.

A failing handler's transaction rolls back; the failure is counted in a transaction of its own, so the count survives
every crash, and at `max_attempts` the message is dead: the transport sets it aside with the reason. Postgres being out
is not a failure of the message: it raises, nothing is counted, and the transport holds the message until it is back.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from app import db
from app.errors import DatabaseUnavailable
from app.loops import full_jitter
from app.messaging import inbox
from app.messaging.envelope import Envelope, UnreadableMessage, one_line
from app.observability.metrics import Metrics
from app.observability.traces import trace_context

log = structlog.get_logger(__name__)

Handler = Callable[[db.Connection, Envelope], Awaitable[None]]

RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.1, 10.0  # all attempts fit well inside the broker's ack timeout


@dataclass(frozen=True, slots=True)
class Handled:
    """The message has taken effect, now or before."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The handler failed; try again after a pause."""

    in_seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Dead:
    """Trying again cannot help, or was tried often enough."""

    reason: str
    attempts: int
    first_failure_at: datetime
    last_failure_at: datetime


Verdict = Handled | Retry | Dead


class Consumer:
    """Turns deliveries into effects. `handlers` maps the event types it consumes to what they do in a transaction."""

    def __init__(
        self,
        pool: db.Pool,
        name: str,
        handlers: Mapping[str, Handler],
        metrics: Metrics,
        *,
        max_attempts: int,
        after_commit: Callable[[], None],
        checkpoint: Callable[[str], None],
    ) -> None:
        self.handlers = handlers
        self._pool = pool
        self._name = name
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._after_commit = after_commit
        self._checkpoint = checkpoint

    async def handle(self, envelope: Envelope) -> Verdict:
        """Give the message its effect, once. Raises DatabaseUnavailable, and only that."""
        handler = self.handlers.get(envelope.type)
        if handler is None:
            return await self._dead(envelope, f"unknown type {envelope.type}")
        try:
            with trace_context({"traceparent": envelope.traceparent, "tracestate": envelope.tracestate}):
                first = await self._apply(handler, envelope)
        except DatabaseUnavailable:
            raise
        except UnreadableMessage as error:
            return await self._dead(envelope, f"unreadable: {error}")
        except Exception as error:
            log.exception("consumer.failed", event_id=str(envelope.id), order_id=envelope.subject)
            return await self._failed(envelope, f"{type(error).__name__}: {error}")
        (self._metrics.consumer_processed if first else self._metrics.consumer_dedup_hits).inc()
        return Handled()

    def dead(self, reason: str) -> Dead:
        """Judge a message of which not even the id can be read."""
        now = datetime.now(UTC)
        return Dead(one_line(reason), 1, now, now)

    def gave_up(self) -> None:
        """Count a message that has been set aside."""
        self._metrics.dlq_messages.inc()

    async def _apply(self, handler: Handler, envelope: Envelope) -> bool:
        async with db.transaction(self._pool) as conn:
            first = await inbox.first_time(conn, self._name, str(envelope.id))
            if first:
                await handler(conn, envelope)
        self._checkpoint("consumer.committed")
        if first:
            self._after_commit()
        return first

    async def _failed(self, envelope: Envelope, reason: str) -> Verdict:
        self._metrics.consumer_failed.inc()
        return await self._counted(envelope, reason, self._max_attempts)

    async def _dead(self, envelope: Envelope, reason: str) -> Verdict:
        """Judge a message that trying again cannot help; the inbox knows of it, so that nobody sends it again."""
        return await self._counted(envelope, reason, max_attempts=1)

    async def _counted(self, envelope: Envelope, reason: str, max_attempts: int) -> Verdict:
        reason = one_line(reason)
        async with db.transaction(self._pool) as conn:
            failures = await inbox.failed(conn, self._name, str(envelope.id), reason)
            if failures.attempts < max_attempts:
                return Retry(full_jitter(failures.attempts, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS), reason)
            await inbox.dead(conn, self._name, str(envelope.id))
        return Dead(reason, failures.attempts, failures.first_at, failures.last_at)

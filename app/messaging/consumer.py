"""The consumer: each message takes effect exactly once, in any order and with any number of deliveries.

    one transaction: inbox rows, the handler's effect → commit → (the transport acknowledges)

Messages that arrive at the same time share a transaction. If it fails, or has to wait for another transaction's lock,
each of them runs again in a transaction of its own, so a bad message cannot fail its neighbours.

Where the process may die, and who recovers:

- before the commit: nothing happened; the transport delivers the message again;
- committed, not acknowledged: it is delivered again, the inbox row shows that, and nothing happens twice;
- two deliveries at once: the second waits at the inbox row's primary key and then finds the first one's effect.

When a handler fails, its transaction rolls back. The failure is counted in a transaction of its own, so the count
survives every crash; at `max_attempts` the message is dead, and the transport dead-letters it with the reason. If
Postgres is down or too slow, that is no failure of the message: `handle` raises Unavailable, nothing is counted, and
the transport keeps the message.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import structlog
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from app import db
from app.batcher import Alone, Batcher, BatcherConfig
from app.errors import Unavailable
from app.loops import Backoff
from app.messaging import inbox
from app.messaging.envelope import Envelope, UnreadableMessage, one_line
from app.messaging.facts import DuplicateHandled, HandlerFailed, MessageHandled
from app.messaging.spans import RABBITMQ, processing
from app.observability import log_fields
from app.observability.signals import Signals
from app.observability.traces import trace_headers
from app.values import immutable

log = structlog.get_logger(__name__)

Handler = Callable[[db.Connection, Sequence[Envelope]], Awaitable[None]]

BACKOFF = Backoff(base_seconds=0.1, cap_seconds=10.0)  # all attempts fit well inside the broker's ack timeout


@immutable
class Handled:
    """The message has taken effect, now or before."""


@immutable
class Retry:
    """The handler failed; retry after a pause."""

    in_seconds: float
    reason: str


@immutable
class Dead:
    """Retrying cannot help, or the attempts are used up."""

    reason: str
    attempts: int
    first_failure_at: datetime
    last_failure_at: datetime


HandleResult = Handled | Retry | Dead


@immutable
class _Applied:
    """The message has taken effect; `first`: just now."""

    first: bool


def unreadable(reason: str) -> Dead:
    """Return the result for a message that has no readable id, so that the inbox cannot count it."""
    now = datetime.now(UTC)
    return Dead(one_line(reason), 1, now, now)


class Consumer:
    """Handles messages. `name`: its key in the inbox. `handlers`: by event type; each runs in a transaction.

    A handler gets all messages of the transaction, each for the first time. It may run again with the same ones.

    `messaging_system`: the name of the transport in spans.
    """

    def __init__(
        self,
        pool: db.Pool,
        name: str,
        handlers: Mapping[str, Handler],
        max_attempts: int,
        signals: Signals,
        messaging_system: str = RABBITMQ,
    ) -> None:
        self.handlers = handlers
        self._pool = pool
        self._name = name
        self._max_attempts = max_attempts
        self.signals = signals
        self._messaging_system = messaging_system
        self._batchers: dict[Handler, Batcher[Envelope, _Applied]] = {}

    async def handle(self, envelope: Envelope) -> HandleResult:
        """Run the handler, unless the message already took effect. Raises Unavailable only."""
        with (
            processing(self.signals, envelope, self._name, self._messaging_system) as span,
            log_fields.bound(**envelope.log_fields()),
        ):
            result = await self._handle(envelope)
            if not isinstance(result, Handled):
                span.set_attribute("error.type", "dead" if isinstance(result, Dead) else "failed")
                span.set_status(Status(StatusCode.ERROR, result.reason))
            return result

    async def _handle(self, envelope: Envelope) -> HandleResult:
        handler = self.handlers.get(envelope.type)
        if handler is None:
            return await self._count_failure(envelope, f"unknown type {envelope.type}", max_attempts=1)
        try:
            is_first = await self._apply(handler, envelope)
        except Unavailable:
            raise
        except UnreadableMessage as error:
            return await self._count_failure(envelope, f"unreadable: {error}", max_attempts=1)
        except Exception as error:
            log.exception("consumer.failed")
            self.signals.emit(HandlerFailed())
            return await self._count_failure(envelope, f"{type(error).__name__}: {error}", self._max_attempts)
        if not is_first:
            trace.get_current_span().set_attribute("orders.replayed", value=True)
            self.signals.emit(DuplicateHandled())
        return Handled()

    async def _apply(self, handler: Handler, envelope: Envelope) -> bool:
        """Let the message take effect, unless it did before. Return whether it did now."""
        if headers := trace_headers():  # what the handler starts continues below the span of this delivery
            envelope = replace(envelope, traceparent=headers.get("traceparent"), tracestate=headers.get("tracestate"))
        applied = await self._batcher(handler).submit(envelope)
        if isinstance(applied, Alone):
            async with db.transaction(self._pool) as conn:
                (applied,) = await self._apply_all(conn, handler, [envelope])
        self.signals.crash_point("consumer.committed")
        if applied.first:
            self.signals.emit(MessageHandled(envelope.type))
        return applied.first

    def _batcher(self, handler: Handler) -> Batcher[Envelope, _Applied]:
        if handler not in self._batchers:
            self._batchers[handler] = Batcher(partial(self._apply_batch, handler), BatcherConfig(db.BATCH_SIZE))
        return self._batchers[handler]

    async def _apply_batch(self, handler: Handler, envelopes: Sequence[Envelope]) -> Sequence[_Applied | Alone]:
        once = {envelope.id: envelope for envelope in envelopes}  # a message may have been delivered twice
        async with db.batch_transaction(self._pool, len(once)) as conn:
            applied = dict(zip(once, await self._apply_all(conn, handler, list(once.values())), strict=True))
        return [applied[envelope.id] if once[envelope.id] is envelope else Alone() for envelope in envelopes]

    async def _apply_all(
        self, conn: db.Connection, handler: Handler, envelopes: Sequence[Envelope]
    ) -> Sequence[_Applied]:
        new = await inbox.first_time(conn, self._name, [str(envelope.id) for envelope in envelopes])
        if first := [envelope for envelope in envelopes if str(envelope.id) in new]:
            await handler(conn, first)
        return [_Applied(str(envelope.id) in new) for envelope in envelopes]

    async def _count_failure(self, envelope: Envelope, reason: str, max_attempts: int) -> HandleResult:
        reason = one_line(reason)
        async with db.transaction(self._pool) as conn:
            failures = await inbox.count_failure(conn, self._name, str(envelope.id), reason)
            if failures.attempts < max_attempts:
                return Retry(BACKOFF.pause(failures.attempts), reason)
            await inbox.mark_dead(conn, self._name, str(envelope.id))
        return Dead(reason, failures.attempts, failures.first_at, failures.last_at)

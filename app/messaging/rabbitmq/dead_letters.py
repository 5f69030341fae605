"""Dead letters in RabbitMQ: scan the dead-letter queue in order, replay, remove.

A scan is one consumer on one connection, to which the broker delivers the whole queue. When the connection closes, for
any reason, the messages that the scan did not remove return to the queue. A quorum queue keeps the order of messages
that one consumer returns, but puts them behind those returned before. (It does not keep the order of messages from
several consumers, or from `get`.) So a scan must hold all messages; otherwise the first few would become the last. The
scan never returns a message by publishing it, which could lose or duplicate it. Each return counts as a delivery, so
the queue has practically no delivery limit (`topology.DEAD_LETTER_DELIVERY_LIMIT`).

A scan may die at any point and be repeated:

    replay: reset the attempts in the inbox → commit → publish, confirmed → remove
    purge:  record as purged in the inbox the events that orders still wait for → commit → remove

- attempts reset, not published: the message is still a dead letter, and the inbox has forgotten its failures;
- published, not removed: there are two copies; the inbox lets one of them take effect;
- recorded, not removed: the dead letter is still there, and only an operator can replay it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, HeadersType
from aio_pika.exceptions import ChannelClosed

from app import db
from app.errors import BrokerUnavailable, DeadLettersBusy
from app.messaging import inbox
from app.messaging.dead_letters import DeadLetter
from app.messaging.envelope import REPLAYED_BY, UNDECODABLE, Envelope, UnreadableMessage, one_line, parse
from app.messaging.rabbitmq.connection import SETUP_SECONDS, broker_errors, close, connect
from app.messaging.rabbitmq.messages import clone_message, frame_limit
from app.messaging.rabbitmq.topology import declare, has_current_arguments
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals
from app.observability.traces import trace_headers
from app.values import immutable

MAX_HELD = 10_000  # messages in memory, about 40 MB; a scan of a longer queue changes its order
BUSY_SECONDS = 5.0  # until the broker notices that another scan was killed
BUSY_PAUSE_SECONDS = 0.1
SILENCE_SECONDS = 2.0  # without an expected message: the broker is busy or down, or another client took the message
SILENCES = 2
CONFIRM_SECONDS = 10.0

# Headers that the consumer and the broker add. A replay removes them.
ADDED_HEADERS = frozenset(
    {"x-reason", "x-attempts", "x-first-failure-at", "x-last-failure-at", "x-death", "x-delivery-count"}
    | {"x-acquired-count", "x-opt-deaths", REPLAYED_BY}
    | {f"x-{which}-death-{what}" for which in ("first", "last") for what in ("exchange", "queue", "reason")}
)


@immutable
class RabbitDeadLetters:
    """The dead letters of one queue."""

    pool: db.Pool
    url: str
    queue: QueueSpec
    signals: Signals

    async def may_be_scanned_often(self) -> bool:
        """Return False for a queue that an older release declared: it may have a low delivery limit.

        In RabbitMQ 4, such a queue drops a message after 20 deliveries, and each scan is one. Raises BrokerUnavailable.
        """
        connection = await connect(self.url, "orders dead letters")
        try:
            with broker_errors():
                async with asyncio.timeout(SETUP_SECONDS):
                    return await has_current_arguments(connection, self.queue)
        finally:
            await close(connection)

    @contextlib.asynccontextmanager
    async def scan(self) -> AsyncIterator["_RabbitScan"]:
        """Start a scan. At its end, the messages that it did not remove return to the queue.

        Raises BrokerUnavailable; DeadLettersBusy while another scan runs, because each would see only some messages.
        """
        connection = await connect(self.url, "orders dead letters")
        try:
            with broker_errors():
                async with asyncio.timeout(SETUP_SECONDS):
                    await _lock(connection, self.queue)
                    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                    await declare(connection, channel, self.queue)
                    scan = _RabbitScan(self, channel, await _count(channel, self.queue))
                    if scan.depth:
                        await scan.start()
            yield scan
            await scan.settle()
        finally:
            await close(connection)


class _RabbitScan:
    """One scan. It is the only consumer of the queue while it runs."""

    def __init__(self, source: RabbitDeadLetters, channel: AbstractChannel, depth: int) -> None:
        self.depth = depth
        self._source = source
        self._queue = source.queue
        self._channel = channel
        self._tag: str | None = None
        self._window = max(1, min(depth, MAX_HELD))
        self._taken = self._removed = 0
        self._deliveries: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._taken_last: dict[int, AbstractIncomingMessage] = {}

    async def start(self) -> None:
        """Start consuming the queue."""
        self._channel.close_callbacks.add(lambda *_: self._deliveries.put_nowait(None))
        await self._channel.set_qos(prefetch_count=self._window)
        queue = await self._channel.get_queue(self._queue.dead_letter_queue, ensure=False)
        self._tag = await queue.consume(self._deliveries.put, timeout=SETUP_SECONDS)

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return up to `limit` of the next messages; none at the end, or when the scan holds MAX_HELD messages."""
        self._taken_last = {}
        with broker_errors():
            while len(self._taken_last) < limit and self._taken < self.depth and self._held < self._window:
                message = await self._next()
                if message is None:
                    break
                self._taken += 1
                self._taken_last[self._taken] = message
        return [_parse(number, message) for number, message in self._taken_last.items()]

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Reset the attempts of these messages, publish them to their queue, and remove those that were confirmed."""
        ids = {letter.event_id for letter in letters if letter.event_id is not None}
        async with db.transaction(self._source.pool) as conn:
            await inbox.reset_attempts(conn, self._queue.consumer, ids)
        self._source.signals.crash_point("dlq.rearmed")
        refusals = await asyncio.gather(*(self._publish(letter.number) for letter in letters))
        self._source.signals.crash_point("dlq.published")
        pairs = list(zip(letters, refusals, strict=True))
        await self._remove([letter for letter, refusal in pairs if refusal is None])
        for refusal in refusals:
            if refusal is not None:
                raise refusal

    async def purge(self, letters: Sequence[DeadLetter], recorded: Collection[str]) -> None:
        """Record these event ids as purged, then remove the dead letters."""
        async with db.transaction(self._source.pool) as conn:
            await inbox.mark_purged(conn, self._queue.consumer, recorded)
        self._source.signals.crash_point("dlq.recorded")
        await self._remove(letters)

    async def _remove(self, letters: Collection[DeadLetter]) -> None:
        with broker_errors():
            for letter in letters:
                await self._taken_last[letter.number].ack()
                self._removed += 1

    async def settle(self) -> None:
        """Wait until the broker has processed every removal. Raises BrokerUnavailable.

        While many acknowledgements are in transit to a quorum queue, the channel holds some back, and drops them when
        it closes: up to a dozen of 500 messages came back (measured on 3.10). The queue processes the cancel of the
        consumer after all of them, and counting makes the channel wait for the effects of the cancel.

        A scan that stopped early without removing any does not wait: behind thousands of deliveries, an answer takes
        seconds.
        """
        if self._tag is not None and (self._removed or self._taken == self.depth):
            with broker_errors():
                queue = await self._channel.get_queue(self._queue.dead_letter_queue, ensure=False)
                await queue.cancel(self._tag, timeout=SETUP_SECONDS)
                await _count(self._channel, self._queue)

    @property
    def _held(self) -> int:
        return self._taken - self._removed

    async def _next(self) -> AbstractIncomingMessage | None:
        for _ in range(SILENCES):
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await self._deliveries.get()
            except TimeoutError:
                await _count(self._channel, self._queue)  # raises if the broker is down
                continue
            if message is None:
                raise BrokerUnavailable("rabbitmq: the connection was lost")
            return message
        return None  # another client removed messages

    async def _publish(self, number: int) -> BrokerUnavailable | None:
        message = self._taken_last[number]
        headers = {name: value for name, value in message.headers.items() if name not in ADDED_HEADERS}
        try:
            with broker_errors():
                trace = trace_headers()
                added: HeadersType = {REPLAYED_BY: trace["traceparent"]} if trace else {}
                copy = clone_message(message, headers, frame_limit(message), added)
                copy.priority = message.priority
                await self._channel.default_exchange.publish(
                    copy, self._queue.name, mandatory=True, timeout=CONFIRM_SECONDS
                )
        except BrokerUnavailable as error:
            return error
        return None


async def _count(channel: AbstractChannel, queue: QueueSpec) -> int:
    """Return how many dead letters are ready in the queue."""
    declared = await channel.declare_queue(queue.dead_letter_queue, passive=True, timeout=SETUP_SECONDS)
    return declared.declaration_result.message_count or 0


async def _lock(connection: AbstractConnection, queue: QueueSpec) -> None:
    """Declare an exclusive queue, which the broker deletes with its connection: it serves as a lock."""
    deadline = asyncio.get_running_loop().time() + BUSY_SECONDS
    while True:
        channel = await connection.channel()
        try:
            await channel.declare_queue(f"{queue.dead_letter_queue}.pass", exclusive=True)
        except ChannelClosed as error:
            if "RESOURCE_LOCKED" not in str(error):
                raise
            if asyncio.get_running_loop().time() > deadline:
                raise DeadLettersBusy("somebody else is going over the dead letters; try again in a moment") from error
            await asyncio.sleep(BUSY_PAUSE_SECONDS)
        else:
            return


def _parse(number: int, message: AbstractIncomingMessage) -> DeadLetter:
    reason, attempts, first, last = _failures(message.headers)
    envelope: Envelope | None
    try:
        envelope = parse(message.headers, message.body)
    except UnreadableMessage:
        envelope = None
    name = message.message_id or (str(envelope.id) if envelope else "")
    return DeadLetter(
        number=number,
        id=_text(name) or "-",
        event_id=str(envelope.id) if envelope else None,
        type=_text(envelope.type if envelope else message.type) or None,
        subject=_text(envelope.subject) if envelope else None,
        tenant=_text(envelope.tenant) if envelope else None,
        reason=reason,
        attempts=attempts,
        first_failure_at=first,
        last_failure_at=last,
    )


def _failures(headers: Mapping[str, Any]) -> tuple[str, int | None, datetime | None, datetime | None]:
    """Return reason, attempts, first and last failure: from the consumer's headers, else from the broker's."""
    if "x-reason" in headers:
        attempts = headers.get("x-attempts")
        return (
            _text(headers["x-reason"]),
            attempts if isinstance(attempts, int) else None,
            _instant(headers.get("x-first-failure-at")),
            _instant(headers.get("x-last-failure-at")),
        )
    deaths = headers.get("x-death")
    if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict):
        death = deaths[0]  # the latest comes first
        at = _instant(death.get("time"))
        return f"{_text(death.get('reason'))} of {_text(death.get('queue'))}, by the broker", None, at, at
    if UNDECODABLE in headers:
        return f"its properties cannot be decoded: {_text(headers[UNDECODABLE])}", None, None, None
    return "unknown: the message has neither x-reason nor x-death", None, None, None


def _instant(value: object) -> datetime | None:
    if not isinstance(value, datetime):
        try:
            value = datetime.fromisoformat(_text(value))
        except ValueError:
            return None
    return value if value.tzinfo else None


def _text(value: object) -> str:
    """Return one printable line: the value may come from any publisher, and is shown on terminals."""
    return one_line(value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value))

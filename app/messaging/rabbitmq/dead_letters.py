"""The dead-letter queue: gone over in order, sent again, removed; what is not removed goes back to its place.

One pass is one consumer on one connection, to which the broker gives the whole queue, whatever of it is meant. What the
pass does not remove goes back when the connection closes, however that comes about: a quorum queue puts what one
consumer had into its former order (not what several had, nor what was taken by `get`) behind all that was given back
before; so nothing may be left there, or a look at the first few would make them the last. Nothing is given back by
publishing it, which could lose or double it. Each return counts as a delivery, so the queue has no delivery limit to
speak of (`rabbitmq.DEAD_LETTER_DELIVERY_LIMIT`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelClosed

from app.errors import BrokerUnavailable, DeadLettersBusy
from app.messaging.envelope import UNDECODABLE, Envelope, UnreadableMessage, one_line, parse
from app.messaging.rabbitmq.transport import (
    DEAD_LETTER_QUEUE,
    QUEUE,
    SETUP_SECONDS,
    close,
    connect,
    copied,
    declare_topology,
    frame_limit,
    unavailable,
)

MAX_HELD = 10_000  # messages in this process's memory, about 40 MB; in a longer queue some may lose their place
BUSY_SECONDS = 5.0  # a pass that was killed a moment ago is over when the broker has noticed
BUSY_PAUSE_SECONDS = 0.1
SILENCE_SECONDS = 2.0  # without a message that was counted: the broker is busy, or gone, or somebody else took it
SILENCES = 2
CONFIRM_SECONDS = 10.0

# What dead-lettering and delivering put on a message: ours and the broker's. A replay begins without.
ADDED_HEADERS = frozenset(
    {"x-reason", "x-attempts", "x-first-failure-at", "x-last-failure-at", "x-death", "x-delivery-count"}
    | {"x-acquired-count", "x-opt-deaths"}
    | {f"x-{which}-death-{what}" for which in ("first", "last") for what in ("exchange", "queue", "reason")}
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up. `number`: its place in the pass, from 1. None: the message does not say.

    `event_id`: as the inbox knows it; None: the message cannot be read. `id`: the message's own, else the event's, else
    `-`; the consumer gives one to each that it sets aside.
    """

    number: int
    id: str
    event_id: str | None
    type: str | None
    subject: str | None
    tenant: str | None
    reason: str
    attempts: int | None
    first_failure_at: datetime | None
    last_failure_at: datetime | None


class QueuePass:
    """One pass over the messages that were in the queue when it began: `depth` of them."""

    def __init__(self, channel: AbstractChannel, depth: int) -> None:
        self.depth = depth
        self._channel = channel
        self._tag: str | None = None
        self._window = max(1, min(depth, MAX_HELD))
        self._taken = self._removed = 0
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._at_hand: dict[int, AbstractIncomingMessage] = {}

    async def start(self) -> None:
        """Begin to take messages."""
        self._channel.close_callbacks.add(lambda *_: self._arrived.put_nowait(None))
        await self._channel.set_qos(prefetch_count=self._window)
        queue = await self._channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
        self._tag = await queue.consume(self._arrived.put, timeout=SETUP_SECONDS)

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return the next messages, up to `limit`; none at the end, or when as many are held as may be."""
        self._at_hand = {}
        with broker_errors():
            while len(self._at_hand) < limit and self._taken < self.depth and self._held < self._window:
                message = await self._next()
                if message is None:
                    break
                self._taken += 1
                self._at_hand[self._taken] = message
        return [_letter(number, message) for number, message in self._at_hand.items()]

    async def publish_again(self, letters: Sequence[DeadLetter]) -> list[BrokerUnavailable | None]:
        """Publish messages of the last `take` to their queue. Returns None for each that the broker has confirmed."""
        return await asyncio.gather(*(self._publish(letter.number) for letter in letters))

    async def remove(self, letters: Collection[DeadLetter]) -> None:
        """Remove messages of the last `take`, for good."""
        with broker_errors():
            for letter in letters:
                await self._at_hand[letter.number].ack()
                self._removed += 1

    async def settle(self) -> None:
        """Return when the broker has acted on every removal. Raises BrokerUnavailable.

        A channel holds acknowledgements back while many are under way to a quorum queue, and forgets those when it
        closes: up to a dozen of 500 came back (measured on 3.10). Ending the consumer is answered by the queue, behind
        them all, and counting makes the channel wait for that answer's side effects.
        """
        if self._tag is not None:
            with broker_errors():
                queue = await self._channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
                await queue.cancel(self._tag, timeout=SETUP_SECONDS)
                await count(self._channel)

    @property
    def _held(self) -> int:
        return self._taken - self._removed

    async def _next(self) -> AbstractIncomingMessage | None:
        for _ in range(SILENCES):
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await self._arrived.get()
            except TimeoutError:
                await count(self._channel)  # an answer tells that the broker is there
                continue
            if message is None:
                raise BrokerUnavailable("rabbitmq: the connection was lost")
            return message
        return None  # the queue is shorter than it was

    async def _publish(self, number: int) -> BrokerUnavailable | None:
        message = self._at_hand[number]
        headers = {name: value for name, value in message.headers.items() if name not in ADDED_HEADERS}
        try:
            with broker_errors():
                again = copied(message, headers, frame_limit(message))
                again.priority = message.priority
                await self._channel.default_exchange.publish(again, QUEUE, mandatory=True, timeout=CONFIRM_SECONDS)
        except BrokerUnavailable as error:
            return error
        return None


@contextlib.asynccontextmanager
async def opened(url: str, routing_keys: Collection[str]) -> AsyncIterator[QueuePass]:
    """Begin a pass; at the end all that it did not remove go back.

    Raises BrokerUnavailable; DeadLettersBusy while there is another pass, which would see a part of the messages only.
    """
    connection = await connect(url, "orders dead letters")
    try:
        with broker_errors():
            async with asyncio.timeout(SETUP_SECONDS):
                await _be_alone(connection)
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                await declare_topology(connection, channel, routing_keys)
                one = QueuePass(channel, await count(channel))
                if one.depth:
                    await one.start()
        yield one
        await one.settle()
    finally:
        await close(connection)


async def count(channel: AbstractChannel) -> int:
    """Return how many messages wait in the queue."""
    queue = await channel.declare_queue(DEAD_LETTER_QUEUE, passive=True, timeout=SETUP_SECONDS)
    return queue.declaration_result.message_count or 0


@contextlib.contextmanager
def broker_errors() -> Iterator[None]:
    """Turn what says that the broker is out, or took a message not, into BrokerUnavailable."""
    try:
        yield
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        raise unavailable(error) from error


async def _be_alone(connection: AbstractConnection) -> None:
    """Declare a queue that is this connection's alone and ends with it: the broker's own lock."""
    deadline = asyncio.get_running_loop().time() + BUSY_SECONDS
    while True:
        channel = await connection.channel()
        try:
            await channel.declare_queue(f"{DEAD_LETTER_QUEUE}.pass", exclusive=True)
        except ChannelClosed as error:
            if "RESOURCE_LOCKED" not in str(error):
                raise
            if asyncio.get_running_loop().time() > deadline:
                raise DeadLettersBusy("somebody else is going over the dead letters; try again in a moment") from error
            await asyncio.sleep(BUSY_PAUSE_SECONDS)
        else:
            return


def _letter(number: int, message: AbstractIncomingMessage) -> DeadLetter:
    reason, attempts, first, last = _story(message.headers)
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


def _story(headers: Mapping[str, Any]) -> tuple[str, int | None, datetime | None, datetime | None]:
    """Return reason, attempts, first and last failure: as the consumer told them, else as the broker did."""
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
        return f"{_text(death.get('reason'))} of {_text(death.get('queue'))}, as the broker says", None, at, at
    if UNDECODABLE in headers:
        return f"its properties cannot be decoded: {_text(headers[UNDECODABLE])}", None, None, None
    return "not told: neither x-reason nor x-death is there", None, None, None


def _instant(value: object) -> datetime | None:
    if not isinstance(value, datetime):
        try:
            value = datetime.fromisoformat(_text(value))
        except ValueError:
            return None
    return value if value.tzinfo else None


def _text(value: object) -> str:
    """Make a line of whatever somebody sent: it is shown on terminals."""
    return one_line(value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value))

"""The fault proxy before a real RabbitMQ: it loses, doubles and reorders confirms, acknowledgements and deliveries."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pamqp.frame
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPConnectionError
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from chaos.proxy import amqp
from chaos.proxy.faults import Block, Double, Eat, Lose, Overtake
from chaos.proxy.proxy import Proxy
from tests.harness.messages import next_message, open_channel, take
from tests.harness.queues import QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

CONFIRM, ACKNOWLEDGEMENT = Eat(amqp.CONFIRM), Eat(amqp.ACKNOWLEDGEMENT)


@dataclass
class Proxied:
    """A client behind the proxy, and a witness with a direct connection to the broker."""

    proxy: Proxy
    connection: AbstractConnection
    channel: AbstractChannel
    witness: AbstractChannel
    received: list[AbstractIncomingMessage] = field(default_factory=list)

    async def publish(self, body: bytes) -> None:
        await self.channel.default_exchange.publish(aio_pika.Message(body), QUEUE)

    async def send(self, *bodies: bytes) -> None:
        for body in bodies:
            await self.witness.default_exchange.publish(aio_pika.Message(body), QUEUE)

    async def consume(self) -> None:
        async def take_in(message: AbstractIncomingMessage) -> None:
            self.received.append(message)

        await (await self.channel.get_queue(QUEUE, ensure=False)).consume(take_in)

    async def receives(self, *bodies: bytes) -> None:
        """Wait for these messages, and compare their order."""
        await wait_until(lambda: len(self.received) >= len(bodies), AMPLE_SECONDS, f"{len(bodies)} messages")
        assert [message.body for message in self.received] == list(bodies)

    async def works(self) -> None:
        """Make a round trip, after which everything sent before has arrived."""
        await self.channel.declare_queue(QUEUE, passive=True)


@pytest.fixture
async def proxied(rabbitmq_url: str) -> AsyncIterator[Proxied]:
    parts = urlsplit(rabbitmq_url)
    async with (
        open_channel(rabbitmq_url) as witness,
        Proxy(parts.hostname or "", parts.port or 0, frames=amqp) as proxy,
        await aio_pika.connect(proxy.url(rabbitmq_url)) as connection,
    ):
        yield Proxied(proxy, connection, await connection.channel(), witness)
        proxy.cut()


async def test_large_messages_arrive_whole_both_ways(proxied: Proxied) -> None:
    """Large messages pass the proxy unchanged in both directions."""
    body = bytes(range(256)) * 4096
    await proxied.publish(body)
    await proxied.consume()
    await proxied.receives(body)


async def test_an_eaten_confirm_never_arrives(proxied: Proxied) -> None:
    """The publisher gets no confirm, but the message is in the queue."""
    proxied.proxy.arm(CONFIRM)
    publishing = asyncio.create_task(proxied.publish(b"unheard"))
    assert (await next_message(proxied.witness, QUEUE)).body == b"unheard"
    await wait_until(lambda: proxied.proxy.struck[CONFIRM], AMPLE_SECONDS, "confirm")
    await proxied.works()
    assert not publishing.done()
    assert proxied.proxy.struck == {CONFIRM: 1}
    publishing.cancel()


async def test_a_lost_confirm_is_a_connection_error(
    proxied: Proxied,
) -> None:
    """The publisher gets an error, but the message is in the queue."""
    proxied.proxy.arm(Lose(amqp.CONFIRM))
    with pytest.raises(AMQPConnectionError):
        await proxied.publish(b"unheard")
    assert (await next_message(proxied.witness, QUEUE)).body == b"unheard"


async def test_an_eaten_ack_causes_a_redelivery(proxied: Proxied) -> None:
    """A message whose acknowledgement is eaten is delivered again when the connection ends."""
    proxied.proxy.arm(ACKNOWLEDGEMENT)
    await proxied.consume()
    await proxied.send(b"done")
    await proxied.receives(b"done")
    await proxied.received[0].ack()
    await proxied.works()
    assert proxied.proxy.struck == {ACKNOWLEDGEMENT: 1}
    proxied.proxy.cut()
    again = await next_message(proxied.witness, QUEUE)
    assert (again.body, again.redelivered) == (b"done", True)


async def test_a_doubled_delivery_needs_both_acks(proxied: Proxied) -> None:
    """The broker gets the acknowledgement when both copies are acknowledged."""
    double = Double(amqp.DELIVERY, times=1)
    proxied.proxy.arm(double)
    await proxied.consume()
    await proxied.send(b"twice", b"once")
    await proxied.receives(b"twice", b"twice", b"once")
    for message in proxied.received:
        await message.ack()
    await proxied.works()
    proxied.proxy.cut()
    await proxied.send(b"last")
    assert (await next_message(proxied.witness, QUEUE)).body == b"last"
    assert proxied.proxy.struck == {double: 1}


async def test_one_ack_of_a_doubled_delivery_is_not_enough(proxied: Proxied) -> None:
    """A delivery of which one copy is acknowledged is delivered again."""
    proxied.proxy.arm(Double(amqp.DELIVERY))
    await proxied.consume()
    await proxied.send(b"twice")
    await proxied.receives(b"twice", b"twice")
    await proxied.received[0].ack()
    await proxied.works()
    proxied.proxy.cut()
    assert (await next_message(proxied.witness, QUEUE)).redelivered


async def test_only_the_next_delivery_overtakes(proxied: Proxied) -> None:
    """A held delivery arrives after the next one."""
    overtake = Overtake(amqp.DELIVERY, times=2)
    proxied.proxy.arm(overtake)
    await proxied.consume()
    await proxied.send(b"1", b"2", b"3", b"4", b"5")
    await proxied.receives(b"2", b"1", b"4", b"3", b"5")
    assert proxied.proxy.struck == {overtake: 2}


async def test_disarming_releases_a_held_delivery(proxied: Proxied) -> None:
    """A delivery that none overtakes arrives when the fault is disarmed."""
    proxied.proxy.arm(Overtake(amqp.DELIVERY))
    await proxied.consume()
    await proxied.send(b"alone")
    await wait_until(lambda: proxied.proxy.struck, AMPLE_SECONDS, "delivery")
    await proxied.works()
    assert proxied.received == []
    proxied.proxy.disarm()
    await proxied.receives(b"alone")


async def test_an_eaten_cancel_never_arrives(proxied: Proxied) -> None:
    """The consumer does not learn that the broker cancelled it."""
    cancellation = Eat(amqp.CANCELLATION)
    proxied.proxy.arm(cancellation)
    await proxied.consume()
    cancelled = asyncio.Event()
    (await proxied.channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lambda _: cancelled.set())
    await proxied.witness.queue_delete(QUEUE)
    await wait_until(lambda: proxied.proxy.struck[cancellation], AMPLE_SECONDS, "notice")
    await proxied.channel.declare_exchange("orders.events", passive=True)  # a round trip
    assert not cancelled.is_set()


async def test_a_block_notifies_the_publisher(
    proxied: Proxied,
) -> None:
    """The publisher is notified of the block and of its end; then its message arrives."""
    block = Block(amqp.PUBLISHED)
    proxied.proxy.arm(block)
    publishing = asyncio.create_task(proxied.publish(b"waits"))
    assert proxied.connection.transport is not None
    unblocked = proxied.connection.transport.connection.ready
    await wait_until(lambda: proxied.proxy.struck[block], AMPLE_SECONDS, "publishing")
    await wait_until(lambda: is_left_waiting(unblocked), AMPLE_SECONDS, "notice of being blocked")
    assert await take(proxied.witness, QUEUE) is None
    assert not publishing.done()
    proxied.proxy.disarm()
    await publishing
    await unblocked()
    assert (await next_message(proxied.witness, QUEUE)).body == b"waits"


async def is_left_waiting(what: object) -> bool:
    """Return whether the call does not return at once."""
    assert callable(what)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            await what()
            return False
    return True


# Frames in segments


def marshalled(*frames: object, channel: int = 1) -> bytes:
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in frames)  # type: ignore[arg-type]


def message(method: object, *bodies: bytes) -> list[bytes]:
    header = ContentHeader(body_size=sum(map(len, bodies)))
    return [marshalled(frame) for frame in (method, header, *map(ContentBody, bodies))]


def start_ok(**capabilities: bool) -> bytes:
    properties: Any = {"capabilities": {name.replace("_", "."): value for name, value in capabilities.items()}}
    return marshalled(commands.Connection.StartOk(properties, response="x"), channel=0)


BEAT = marshalled(Heartbeat(), channel=0)
TAGGED = commands.Basic.Deliver("tag", 7, redelivered=False, exchange="e", routing_key="r")
PUBLISHED = message(commands.Basic.Publish(exchange="e", routing_key="r"), b"first ", b"second")
DELIVERED, EMPTY = message(TAGGED, b"first ", b"second"), message(TAGGED)
ACKED = marshalled(commands.Basic.Ack(7))
RETURNED = b"".join(message(commands.Basic.Return(312, "NO_ROUTE", "e", "r"), b"back"))
OTHER_CHANNEL = marshalled(commands.Basic.QosOk(), channel=2)
SENT = (
    [ProtocolHeader().marshal(), start_ok(connection_blocked=True), PUBLISHED[0], BEAT, *PUBLISHED[1:], ACKED],
    [b"".join(PUBLISHED), ACKED],
)
RECEIVED = (
    [RETURNED, *DELIVERED[:2], OTHER_CHANNEL, BEAT, *DELIVERED[2:], *EMPTY, ACKED],
    [b"".join(DELIVERED), b"".join(EMPTY), ACKED],
)


@given(cuts=st.sets(st.integers(1, 300)))
def test_chunk_boundaries_do_not_matter(cuts: set[int]) -> None:
    """With any chunk boundaries, the same frames are named, and no byte is lost."""
    for watcher, (frames, named) in ((amqp.requests(), SENT), (amqp.answers(), RECEIVED)):
        stream = b"".join(frames)
        edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
        chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
        pieces = [piece for chunk in chunks for piece in watcher.feed(chunk)]
        assert sorted(b"".join(piece.data for piece in pieces)) == sorted(stream)
        assert [piece.data for piece in pieces if piece.frame] == named


@pytest.mark.parametrize(("announced", "notified"), [(True, True), (False, False)])
def test_only_capable_clients_are_notified_of_a_block(announced: bool, notified: bool) -> None:
    """Only a client that announced `connection.blocked` is notified."""
    watcher = amqp.requests()
    stream = ProtocolHeader().marshal() + start_ok(connection_blocked=announced) + b"".join(PUBLISHED)
    last = list(watcher.feed(stream))[-1]
    assert (bool(last.blocked), bool(last.unblocked)) == (notified, notified)
    if notified:
        assert isinstance(pamqp.frame.unmarshal(last.blocked)[2], commands.Connection.Blocked)
        assert isinstance(pamqp.frame.unmarshal(last.unblocked)[2], commands.Connection.Unblocked)


@pytest.mark.parametrize("stream", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01", BEAT[:-1] + b"\0"])
def test_a_stream_of_another_protocol_is_an_error(stream: bytes) -> None:
    """A stream of another protocol raises ValueError."""
    with pytest.raises(ValueError, match="not an AMQP frame"):
        list(amqp.requests().feed(stream))

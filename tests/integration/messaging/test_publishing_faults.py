"""Faults of the broker or the network while publishing: every event arrives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.errors import BrokerUnavailable
from app.loops import Loop
from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.relay import Relay
from app.messaging.topology import EXCHANGE
from chaos.proxy import amqp
from chaos.proxy.faults import Blackhole, Block, Eat, Fault, Lose, Refuse
from chaos.proxy.proxy import Proxy
from tests.harness.api import serving
from tests.harness.dead_letters import drained
from tests.harness.events import CONFIRMED, counted, event, put
from tests.harness.messages import next_message, publishing
from tests.harness.observed import Observed
from tests.harness.queues import QUEUE
from tests.harness.relays import make_relay
from tests.harness.wait import AMPLE_SECONDS, wait_until

DEADLINE_SECONDS = 0.5  # for a batch's confirms: short, so that tests are fast


@pytest.fixture
async def transport(broker_proxy: Proxy, rabbitmq_url: str) -> AsyncIterator[RabbitPublisher]:
    """A transport that publishes through the proxy, and has connected."""
    async with publishing(broker_proxy.url(rabbitmq_url), DEADLINE_SECONDS) as transport:
        await wait_until(lambda: connects(transport), AMPLE_SECONDS, "connection")
        yield transport


async def connects(transport: RabbitPublisher) -> bool:
    with contextlib.suppress(BrokerUnavailable):  # its deadline is short
        return await transport.publish([]) == []
    return False


def relay_over(pool: db.Pool, transport: RabbitPublisher, signals: Observed | None = None) -> Relay:
    return make_relay(pool, transport, signals, batch_size=10, backoff_seconds=0.05)


async def unpublished(pool: db.Pool) -> list[tuple[int, bool]]:
    """Return, for each unpublished row, its attempts, and whether a relay may claim it now."""
    query = """
        SELECT attempts, claim_token IS NULL AND parked_at IS NULL AND next_attempt_at <= clock_timestamp() AS due
        FROM outbox WHERE published_at IS NULL
    """
    async with db.connection(pool) as conn:
        return [(row["attempts"], row["due"]) for row in await conn.fetch(query)]


@pytest.mark.parametrize(
    "fault",
    [Eat(amqp.CONFIRM), Lose(amqp.CONFIRM), Lose(amqp.CONFIRM, silent=True)],
    ids=["eaten", "cut", "silent"],
)
async def test_unconfirmed_rows_are_sent_again(
    pool: db.Pool, broker_proxy: Proxy, transport: RabbitPublisher, channel: AbstractChannel, fault: Fault
) -> None:
    """Rows whose confirm is lost are sent again with their ids, and use up no attempt."""
    events = [event() for _ in range(5)]
    await put(pool, *events)
    relay = relay_over(pool, transport)
    broker_proxy.arm(fault)

    async def strikes() -> int:
        with pytest.raises(BrokerUnavailable):
            await relay.run_once()
        return broker_proxy.struck[fault]

    await wait_until(strikes, AMPLE_SECONDS, "a confirm that is lost")
    assert await unpublished(pool) == [(0, True)] * 5
    broker_proxy.disarm()
    await wait_until(lambda: drains(pool, relay), AMPLE_SECONDS, "a connection that works")
    ids = await drained(channel, QUEUE)
    assert set(ids) == {str(envelope.id) for envelope in events}
    assert len(ids) > 5


async def test_a_blocked_connection_holds_one_batch(
    pool: db.Pool, broker_proxy: Proxy, transport: RabbitPublisher, channel: AbstractChannel
) -> None:
    """While the broker blocks publishing, one batch waits there, no attempt is used up, and nothing hangs."""
    block, sent = Block(amqp.PUBLISHED), event()
    await put(pool, sent)
    relay = relay_over(pool, transport)
    broker_proxy.arm(block)
    await wait_until(lambda: keeps_waiting(relay.run_once, transport), AMPLE_SECONDS, "notice of being blocked")
    waiting = broker_proxy.struck[block]  # one, unless its deadline passed before the notice arrived
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            await relay.run_once()
        assert await unpublished(pool) == [(0, True)]
        with pytest.raises(BrokerUnavailable):
            relay.check()
    assert broker_proxy.struck == {block: waiting}
    assert await drained(channel, QUEUE) == []
    broker_proxy.disarm()
    await wait_until(lambda: drains(pool, relay), AMPLE_SECONDS, "the end of the block")
    relay.check()
    assert set(await drained(channel, QUEUE)) == {str(sent.id)}


async def keeps_waiting(publish: Callable[[], Awaitable[object]], transport: RabbitPublisher) -> bool:
    """Publish without success; return whether the transport keeps its connection, as it does while blocked."""
    with pytest.raises(BrokerUnavailable):
        await publish()
    return transport.connected


async def drains(pool: db.Pool, relay: Relay) -> bool:
    """Publish a batch; return whether everything is published."""
    with contextlib.suppress(BrokerUnavailable):
        await relay.run_once()
    return await unpublished(pool) == []


async def test_a_blocked_connection_that_dies_is_replaced(broker_proxy: Proxy, transport: RabbitPublisher) -> None:
    publish = partial(transport.publish, [event()])
    broker_proxy.arm(Block(amqp.PUBLISHED))
    await wait_until(lambda: keeps_waiting(publish, transport), AMPLE_SECONDS, "notice of being blocked")
    broker_proxy.cut()
    broker_proxy.disarm()

    async def delivers() -> bool:
        with contextlib.suppress(BrokerUnavailable):
            return await publish() == [None]
        return False

    await wait_until(delivers, AMPLE_SECONDS, "another connection")


async def test_readiness_reports_whether_publishing_works(
    pool: db.Pool, database_url: str, broker_proxy: Proxy, rabbitmq_url: str
) -> None:
    """Connecting works all the time, so it proves nothing."""
    url = broker_proxy.url(rabbitmq_url)
    settings = {"rabbitmq_url": url, "outbox_publish_timeout_seconds": DEADLINE_SECONDS}
    async with serving(database_url, roles="relay", **settings) as process:

        async def answers(status: int, detail: str = "") -> bool:
            answer = await process.get("/readyz")
            return answer.status_code == status and detail in answer.text

        await wait_until(partial(answers, 200), AMPLE_SECONDS, "readiness of a relay that has nothing to publish")
        broker_proxy.arm(Eat(amqp.CONFIRM))
        await put(pool, event())
        not_confirmed = partial(answers, 503, "the last batch was not confirmed in time")
        await wait_until(not_confirmed, AMPLE_SECONDS, "word of a batch that failed")
        broker_proxy.disarm()
        await wait_until(partial(answers, 200), AMPLE_SECONDS, "readiness after a confirm")
        broker_proxy.arm(Refuse())
        broker_proxy.cut()
        await wait_until(partial(answers, 503), AMPLE_SECONDS, "word of a lost connection")
        broker_proxy.disarm()
        await wait_until(partial(answers, 200), AMPLE_SECONDS, "readiness after another connection")


@pytest.mark.parametrize("lost", ["binding", "queue"])
async def test_a_return_restores_the_topology(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, lost: str
) -> None:
    """After a return, the topology is declared again before the row is sent again."""
    signals, returned, fine = Observed(), event(), event(event_type=CONFIRMED)
    await put(pool, returned, fine)
    async with publishing(rabbitmq_url) as transport:
        assert await transport.publish([]) == []  # connects, and declares
        if lost == "binding":
            await (await channel.get_queue(QUEUE)).unbind(EXCHANGE, "order.placed")
        else:
            await channel.queue_delete(QUEUE)
        relay = relay_over(pool, transport, signals)
        assert await relay.run_once() == 2
        assert [attempts for attempts, _ in await unpublished(pool)] == [1]
        await wait_until(relay.run_once, AMPLE_SECONDS, "the row, due again")
    assert await unpublished(pool) == []
    assert counted(signals, "outbox_returned_total") == 1
    assert (await next_message(channel, QUEUE)).message_id == str(returned.id)


async def test_a_cancelled_relay_releases_its_rows_at_once(
    pool: db.Pool, broker_proxy: Proxy, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """A cancelled relay releases its rows at once."""
    only = event()
    await put(pool, only)
    async with publishing(broker_proxy.url(rabbitmq_url)) as stuck, publishing(rabbitmq_url) as works:
        assert await stuck.publish([]) == []
        broker_proxy.arm(Blackhole())
        task = asyncio.create_task(Loop("relay", relay_over(pool, stuck).run_once, 1).run())
        await wait_until(lambda: is_claimed(pool), AMPLE_SECONDS, "claim")
        task.cancel()
        await asyncio.wait([task])
        assert await relay_over(pool, works).run_once() == 1
    assert (await next_message(channel, QUEUE)).message_id == str(only.id)


async def is_claimed(pool: db.Pool) -> bool:
    return await unpublished(pool) == [(0, False)]

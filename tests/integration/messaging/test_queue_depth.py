"""The numbers of waiting messages and dead letters are measured, with and without a broker."""

from uuid import uuid4

import aio_pika
import pytest

from app import db
from app.errors import BrokerUnavailable
from app.messaging import outbox
from app.messaging.local import LocalBroker
from app.messaging.outbox import PublishRecord
from app.messaging.rabbitmq.queue_depth import RabbitQueueDepth
from tests.harness.api import serving
from tests.harness.brokers import remove_topology
from tests.harness.events import CONFIRMED, event, put
from tests.harness.messages import open_channel
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE, SAGA_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until


async def test_depths_are_read_from_the_queues(rabbitmq_url: str) -> None:
    """The depths are the message counts of the two queues."""
    depths = RabbitQueueDepth(rabbitmq_url)
    async with open_channel(rabbitmq_url) as channel:
        assert await depths.read(SAGA_QUEUE) == (0, 0)
        for queue in (QUEUE, QUEUE, QUEUE, DEAD_LETTER_QUEUE):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
        await wait_until(lambda: has_read(depths, (3, 1)), AMPLE_SECONDS, "three and one")
    await depths.close()


async def has_read(depths: RabbitQueueDepth, expected: tuple[int, int]) -> bool:
    return await depths.read(SAGA_QUEUE) == expected


async def test_a_missing_queue_is_an_error(rabbitmq_url: str) -> None:
    """A missing queue raises instead of counting as empty; reading works again once it exists."""
    depths = RabbitQueueDepth(rabbitmq_url)
    for _ in range(2):
        async with open_channel(rabbitmq_url):
            assert await depths.read(SAGA_QUEUE) == (0, 0)
        await remove_topology(rabbitmq_url)
        with pytest.raises(BrokerUnavailable):
            await depths.read(SAGA_QUEUE)
    await depths.close()


async def test_an_unreachable_broker_is_unavailable(free_port: int) -> None:
    """An unreachable broker raises BrokerUnavailable."""
    with pytest.raises(BrokerUnavailable):
        await RabbitQueueDepth(f"amqp://127.0.0.1:{free_port}/").read(SAGA_QUEUE)


async def test_rows_are_counted_without_a_broker(pool: db.Pool) -> None:
    """Without a broker, the pending and parked rows of handled types are counted."""
    waiting, parked, published, of_no_interest = event(), event(), event(), event(event_type=CONFIRMED)
    await put(pool, waiting, parked, published, of_no_interest)
    token = uuid4()
    async with db.connection(pool) as conn:
        await outbox.claim(conn, token, 10, 30)
        await outbox.record_results(conn, token, [PublishRecord(parked.id, "dead"), PublishRecord(published.id)])
    assert await LocalBroker(pool).read_depth(SAGA_QUEUE) == (1, 1)


async def test_relays_and_consumers_show_the_depths(database_url: str, rabbitmq_url: str) -> None:
    """A process with the role relay or consumer shows the depths as metrics."""
    async with open_channel(rabbitmq_url) as channel:
        for queue in (QUEUE, QUEUE, DEAD_LETTER_QUEUE):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
        async with serving(database_url, roles="relay", rabbitmq_url=rabbitmq_url) as process:

            async def depths_are_shown() -> bool:
                lines = (await process.get("/metrics")).text.splitlines()
                return {'queue_depth{queue="orders.saga"} 2.0', "dlq_depth 1.0"} <= set(lines)

            await wait_until(depths_are_shown, AMPLE_SECONDS, "the depths in the metrics")

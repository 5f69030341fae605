"""How much waits in the queue and among the dead letters is measured, with a broker and without one."""

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


async def test_the_depths_are_those_of_the_queues(rabbitmq_url: str) -> None:
    depths = RabbitQueueDepth(rabbitmq_url)
    async with open_channel(rabbitmq_url) as channel:
        assert await depths.read(SAGA_QUEUE) == (0, 0)
        for queue in (QUEUE, QUEUE, QUEUE, DEAD_LETTER_QUEUE):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
        await wait_until(lambda: has_read(depths, (3, 1)), AMPLE_SECONDS, "three and one")
    await depths.close()


async def has_read(depths: RabbitQueueDepth, expected: tuple[int, int]) -> bool:
    return await depths.read(SAGA_QUEUE) == expected


async def test_a_missing_queue_is_no_zero_and_all_is_well_when_it_is_back(rabbitmq_url: str) -> None:
    depths = RabbitQueueDepth(rabbitmq_url)
    for _ in range(2):
        async with open_channel(rabbitmq_url):
            assert await depths.read(SAGA_QUEUE) == (0, 0)
        await remove_topology(rabbitmq_url)
        with pytest.raises(BrokerUnavailable):
            await depths.read(SAGA_QUEUE)
    await depths.close()


async def test_a_broker_out_of_reach_is_unavailable(free_port: int) -> None:
    with pytest.raises(BrokerUnavailable):
        await RabbitQueueDepth(f"amqp://127.0.0.1:{free_port}/").read(SAGA_QUEUE)


async def test_without_a_broker_rows_with_a_handler_are_counted(pool: db.Pool) -> None:
    waiting, parked, published, of_no_interest = event(), event(), event(), event(event_type=CONFIRMED)
    await put(pool, waiting, parked, published, of_no_interest)
    token = uuid4()
    async with db.connection(pool) as conn:
        await outbox.claim(conn, token, 10, 30)
        await outbox.record_results(conn, token, [PublishRecord(parked.id, "dead"), PublishRecord(published.id)])
    assert await LocalBroker(pool).read_depth(SAGA_QUEUE) == (1, 1)


async def test_a_process_that_relays_or_consumes_tells_the_depths(database_url: str, rabbitmq_url: str) -> None:
    async with open_channel(rabbitmq_url) as channel:
        for queue in (QUEUE, QUEUE, DEAD_LETTER_QUEUE):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
        async with serving(database_url, roles="relay", rabbitmq_url=rabbitmq_url) as process:

            async def told() -> bool:
                lines = (await process.get("/metrics")).text.splitlines()
                return {'queue_depth{queue="orders.saga"} 2.0', "dlq_depth 1.0"} <= set(lines)

            await wait_until(told, AMPLE_SECONDS, "the depths in the metrics")

"""A second consumer is one more row: it consumes, deduplicates and dead-letters on its own."""

import contextlib
from collections.abc import AsyncIterator

import aio_pika
import pytest

from app import bootstrap, db
from app.bootstrap import workers
from app.bootstrap.brokers import dead_letters_by_queue, make_broker
from app.bootstrap.consumers import CONSUMERS, ConsumerRow, queues
from app.messaging import outbox
from app.messaging.topology import QueueSpec
from app.operations.dead_letters import DeadLetterAction, DeadLetters
from app.settings import Settings, load
from tests.harness.dead_letters import go_over
from tests.harness.events import CONFIRMED, PLACED, Effects
from tests.harness.observed import Observed
from tests.harness.orders import placed
from tests.harness.queues import QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

LEDGER = QueueSpec("ledger", "orders.ledger", (PLACED, CONFIRMED))


@pytest.fixture(params=["rabbitmq", "in-process"])
async def broker_url(request: pytest.FixtureRequest, rabbitmq_url: str) -> AsyncIterator[str]:
    """RabbitMQ, or none."""
    yield rabbitmq_url if request.param == "rabbitmq" else ""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        for name in (LEDGER.name, LEDGER.dead_letter_queue):
            await channel.queue_delete(name)


@contextlib.asynccontextmanager
async def working(
    pool: db.Pool, database_url: str, broker_url: str, sandbox_url: str, effects: Effects, signals: Observed
) -> AsyncIterator[dict[str, DeadLetters]]:
    """Run relay, the saga's consumer and the second one; lend the dead letters of both."""
    consumers = (*CONSUMERS, ConsumerRow(LEDGER, lambda _: effects))
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    settings = load(
        Settings,
        database_url=database_url,
        rabbitmq_url=broker_url,
        roles="relay,consumer",
        inbox_max_attempts=1,
        outbox_poll_seconds=0.05,
        **partners,
    )
    lease = bootstrap.transport_lease(settings)
    broker = make_broker(broker_url, pool, signals, specs=queues(consumers))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        await lease.renew(pool)
        built = await workers.build(stack, settings, signals, lease, broker, pool, pool, consumers)
        workers.start(stack, built.tasks, AMPLE_SECONDS)
        yield dead_letters_by_queue(pool, broker, queues(consumers))


async def test_it_consumes_deduplicates_and_dead_letters_on_its_own(
    pool: db.Pool, database_url: str, broker_url: str, sandbox_url: str, effects: Effects
) -> None:
    signals = Observed()
    async with working(pool, database_url, broker_url, sandbox_url, effects, signals) as letters:
        first = await placed(pool)
        await effects.arrive(2)  # placed and confirmed: the saga's consumer had its own copy of the first

        async with db.connection(pool) as conn:
            await outbox.republish(conn, [first.id], after_seconds=0)
        await wait_until(lambda: signals.value("consumer_dedup_hits_total") == 2, AMPLE_SECONDS, "one copy for each")
        assert len(await effects.committed()) == 2

        effects.failure = ValueError("no such account")
        await placed(pool)

        async def dead(queue: str) -> int:
            summary, _ = await go_over(letters[queue], DeadLetterAction.PEEK)
            return summary.matched

        if broker_url:  # in-process, a row has one fate: parked, it is the dead letter of both queues
            await wait_until(lambda: dead(LEDGER.name), AMPLE_SECONDS, "a dead letter of the second consumer")
            assert await dead(QUEUE) == 0
            confirmed = "SELECT count(*) FROM orders WHERE status = 'confirmed'"
            await wait_until(lambda: counted(pool, confirmed, 2), AMPLE_SECONDS, "both orders confirmed")
            await wait_until(lambda: dead_are(letters, 2), AMPLE_SECONDS, "both events of the second order")
        else:
            await wait_until(lambda: dead(LEDGER.name), AMPLE_SECONDS, "a parked row")
        effects.failure = None
        await go_over(letters[LEDGER.name], DeadLetterAction.REPLAY)
        await effects.arrive(4)
        assert sorted(await effects.committed(), key=str).count(first.id) == 1


async def counted(pool: db.Pool, query: str, expected: int) -> bool:
    return bool(await pool.fetchval(query) == expected)


async def dead_are(letters: dict[str, DeadLetters], expected: int) -> bool:
    summary, _ = await go_over(letters[LEDGER.name], DeadLetterAction.PEEK)
    return summary.matched == expected


def test_everything_about_a_queue_follows_from_its_row() -> None:
    """Names, bindings and the dead-letter queue."""
    assert (LEDGER.routing_keys, LEDGER.dead_letter_queue) == (("order.placed", "order.confirmed"), "orders.ledger.dlq")

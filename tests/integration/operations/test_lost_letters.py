"""Lost dead letters: the order is started once. Dead letters that still exist wait for an operator."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import pytest
from aio_pika.abc import AbstractChannel
from pamqp.common import FieldTable
from structlog.testing import capture_logs

from app import bootstrap, db
from app.bootstrap import workers
from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import CONSUMERS
from app.messaging import inbox
from app.messaging.dead_letters import DeadLetter, DeadLetterScan, DeadLetterSource
from app.messaging.outbox_dead_letters import OutboxDeadLetters
from app.operations.dead_letters import DeadLetterAction, DeadLetters
from app.operations.maintenance.lost_letters import LostLetters
from app.operations.maintenance.resender import RESEND_AFTER_SECONDS
from app.saga import unstarted
from app.settings import Settings, load
from tests.harness.api import serving
from tests.harness.dead_letters import go_over, holds, in_queue, scan
from tests.harness.events import PLACED, counted
from tests.harness.history import lived_through
from tests.harness.lost_letters import age, dead_lettered, pending, purge_by_hand
from tests.harness.observed import Observed
from tests.harness.plans import full_scans, plans_of
from tests.harness.queues import CONSUMER, DEAD_LETTER_QUEUE, SAGA_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until


@pytest.fixture
def letters(pool: db.Pool, rabbitmq_url: str) -> DeadLetters:
    return in_queue(pool, rabbitmq_url, CONSUMER)


class Counting:
    """A source that counts its scans; `blind`: the scan finds no message."""

    def __init__(self, source: DeadLetterSource, *, blind: bool = False) -> None:
        self.passes = 0
        self._source = source
        self._blind = blind

    async def may_be_scanned_often(self) -> bool:
        return await self._source.may_be_scanned_often()

    @contextlib.asynccontextmanager
    async def scan(self) -> AsyncIterator[DeadLetterScan]:
        self.passes += 1
        async with self._source.scan() as scan:
            yield Blind(scan) if self._blind else scan


class Blind:
    def __init__(self, scan: DeadLetterScan) -> None:
        self.depth = scan.depth
        self.replay, self.purge = scan.replay, scan.purge

    async def take(self, _: int) -> list[DeadLetter]:
        return []


def searching(letters: DeadLetters, pause_seconds: float = 0, signals: Observed | None = None) -> LostLetters:
    return LostLetters(letters, signals or Observed(), pause_seconds)


async def look(letters: DeadLetters, times: int = 3) -> None:
    """Scan `times` times without a pause."""
    search = searching(letters)
    for _ in range(times):
        await search.run_once()


async def confirmed(pool: db.Pool, ids: Sequence[UUID]) -> bool:
    found = await pool.fetchval("SELECT count(*) FROM orders WHERE status = 'confirmed' AND id = ANY($1)", ids)
    return bool(found == len(ids))


async def test_an_order_with_a_lost_dead_letter_is_confirmed(
    pool: db.Pool, database_url: str, rabbitmq_url: str, channel: AbstractChannel, sandbox_url: str
) -> None:
    """Its event is resent with all its attempts, and takes effect once."""
    ids = await dead_lettered(pool, rabbitmq_url, channel, 2)
    await purge_by_hand(channel)
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    roles = "api,relay,consumer,janitor"
    async with serving(database_url, roles=roles, rabbitmq_url=rabbitmq_url, **urls):
        await wait_until(lambda: confirmed(pool, ids), AMPLE_SECONDS, "end of the orders")
    assert await pool.fetchval("SELECT array_agg(resends) FROM outbox WHERE type = $1", PLACED) == [1, 1]
    rows = await pool.fetch("SELECT attempts, dead_at, processed_at IS NOT NULL AS done FROM inbox")
    assert [tuple(row) for row in rows] == [(0, None, True)] * 2
    assert await pool.fetchval("SELECT count(*) FROM sagas") == 2


async def test_only_lost_dead_letters_are_resent(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """Events whose dead letters still exist are not resent."""
    [lost] = await dead_lettered(pool, rabbitmq_url, channel)
    await purge_by_hand(channel)
    [waiting] = await dead_lettered(pool, rabbitmq_url, channel)
    signals = Observed()
    search = searching(letters, signals=signals)
    assert [await search.run_once() for _ in range(2)] == [0, 1]
    assert await pending(pool) == {lost}
    assert counted(signals, "outbox_resent_total") == 1
    records = {row["message_id"]: row["dead_at"] for row in await pool.fetch("SELECT * FROM inbox")}
    assert records[str(lost)] is None
    assert records[str(waiting)] is not None
    await holds(channel, 1)


async def test_the_pause_before_each_resend_doubles(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """Each resend of an event doubles the pause before its next one."""
    [order_id] = await dead_lettered(pool, rabbitmq_url, channel)
    await purge_by_hand(channel)
    minutes = "UPDATE outbox SET resends = 5, published_at = clock_timestamp() - make_interval(mins => $1)"
    for ago, again in ((31, set()), (33, {order_id})):
        await pool.execute(minutes, ago)
        await look(letters)
        assert await pending(pool) == again


async def test_a_recently_dead_event_is_not_resent(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """The inbox is written before the dead letter, which may still be in transit. No scan is made for it."""
    await dead_lettered(pool, rabbitmq_url, channel)
    await purge_by_hand(channel)
    await pool.execute("UPDATE inbox SET dead_at = clock_timestamp()")
    place = Counting(letters.source)
    await look(DeadLetters(pool, SAGA_QUEUE, place))
    assert (await pending(pool), place.passes) == (set(), 0)


async def test_an_incomplete_scan_proves_nothing(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """One scan ends early; another cannot start, because a third one holds the dead letters."""
    await dead_lettered(pool, rabbitmq_url, channel)
    blind = Counting(letters.source, blind=True)
    await look(DeadLetters(pool, SAGA_QUEUE, blind))
    async with scan(pool, rabbitmq_url) as other:
        assert len(await other.take(10)) == 1
        await look(letters, times=1)
    assert (await pending(pool), blind.passes) == (set(), 3)


async def test_a_queue_with_a_low_limit_is_never_scanned(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """RabbitMQ 4 would drop the dead letters of a queue from an older release after 20 scans."""
    await channel.queue_delete(DEAD_LETTER_QUEUE)
    arguments: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": 20}
    await channel.declare_queue(DEAD_LETTER_QUEUE, durable=True, arguments=arguments)
    try:
        await dead_lettered(pool, rabbitmq_url, channel)
        with capture_logs() as logs:
            await look(letters, times=25)
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == [
            "janitor.dead_letters_not_scanned"
        ]
        await holds(channel, 1)
        assert await pending(pool) == set()
    finally:
        await channel.queue_delete(DEAD_LETTER_QUEUE)


async def test_no_scan_runs_while_no_event_is_due(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """Scans stop while no event is due for a resend."""
    [order_id] = await dead_lettered(pool, rabbitmq_url, channel)
    place = Counting(letters.source)
    counting = DeadLetters(pool, SAGA_QUEUE, place)
    patient = searching(counting, pause_seconds=3600)
    for _ in range(3):
        await patient.run_once()
    assert place.passes == 1  # no other scan before the pause is over
    await look(counting)
    assert place.passes == 4
    async with db.connection(pool) as conn:
        await inbox.mark_purged(conn, CONSUMER, [str(order_id)])
    await age(pool)
    await look(counting)
    await pool.execute("UPDATE inbox SET purged_at = NULL")
    await pool.execute("UPDATE orders SET status = 'cancelled'")
    await look(counting)
    assert place.passes == 4


async def test_parked_rows_are_not_lost(pool: db.Pool) -> None:
    """Without a broker, a dead row is resent only if an earlier broker got it; a parked row is not."""
    await lived_through(pool, 2, "2 days", "pending")
    await pool.execute("TRUNCATE sagas CASCADE")
    await pool.execute("UPDATE inbox SET processed_at = NULL, dead_at = clock_timestamp() - interval '1 hour'")
    parked = await pool.fetchval(
        """
        UPDATE outbox SET published_at = NULL, parked_at = clock_timestamp()
        WHERE id = (SELECT id FROM outbox WHERE type = $1 LIMIT 1) RETURNING id
        """,
        PLACED,
    )
    letters = DeadLetters(pool, SAGA_QUEUE, OutboxDeadLetters(pool, SAGA_QUEUE))
    await look(letters)
    assert len(await pending(pool)) == 1
    assert parked not in await pending(pool)
    assert (await go_over(letters, DeadLetterAction.PEEK))[0].depth == 1


@pytest.mark.parametrize(
    ("roles", "rabbitmq_url", "looks"),
    [("janitor", "", False), ("janitor", "amqp://127.0.0.1", True), ("relay,consumer,janitor", "", True)],
)
async def test_a_lone_janitor_without_a_broker_does_not_scan(
    pool: db.Pool, database_url: str, roles: str, rabbitmq_url: str, looks: bool
) -> None:
    """Without a broker's URL, it would take the letters in the other processes' queue for lost."""
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), "http://127.0.0.1")
    settings = load(Settings, database_url=database_url, roles=roles, rabbitmq_url=rabbitmq_url, **urls)
    lease, signals = bootstrap.transport_lease(settings), Observed()
    broker = make_broker(rabbitmq_url, pool, signals)
    async with contextlib.AsyncExitStack() as stack:
        built = await workers.build(stack, settings, signals, lease, broker, pool, pool, CONSUMERS)
    names = {task.name for task in built.tasks}
    assert ("lost-letters" in names, "janitor" in names) == (looks, True)


async def test_dead_events_are_found_by_an_index(pool: db.Pool) -> None:
    """The query for dead events reads no table from end to end."""
    await lived_through(pool, 20_000, "1 day")
    await pool.execute(
        """
        UPDATE inbox SET processed_at = NULL, dead_at = clock_timestamp() - interval '1 hour'
        WHERE message_id IN (SELECT message_id FROM inbox LIMIT 20)
        """
    )
    for _ in range(2):
        for query in (
            lambda conn: unstarted.list_lost(conn, CONSUMER, ["x"], RESEND_AFTER_SECONDS, 500),
            lambda conn: unstarted.list_blocked(conn, CONSUMER, 20),
        ):
            assert full_scans(await plans_of(pool, query)) == set()
        await pool.execute("ANALYZE")

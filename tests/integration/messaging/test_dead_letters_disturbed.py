"""Scans of dead letters that are disturbed or interrupted: nothing is lost, nothing takes effect twice."""

import contextlib
from pathlib import Path

import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.errors import BrokerUnavailable, DeadLettersBusy
from app.messaging.envelope import UnreadableMessage
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetterAction, DeadLetters
from tests.harness import servers
from tests.harness.dead_letters import consuming, drained, go_over, holds, ids, in_queue, put_many, scan
from tests.harness.events import Effects
from tests.harness.messages import open_channel
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until


@pytest.fixture
def letters(pool: db.Pool, rabbitmq_url: str) -> DeadLetters:
    return in_queue(pool, rabbitmq_url)


async def test_a_scan_skips_letters_that_return_during_it(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects, letters: DeadLetters
) -> None:
    """Letters that return to the queue during a scan are left for the next scan."""
    await put_many(channel, 70)
    effects.failure = UnreadableMessage("no such thing")
    async with consuming(rabbitmq_url, effects.consumer(max_attempts=1)):
        summary, _ = await go_over(letters, DeadLetterAction.REPLAY)
        assert (summary.depth, summary.matched) == (70, 70)
        await wait_until(lambda: effects.calls >= 70, AMPLE_SECONDS, "another failure of each")
        await holds(channel, 70)


@pytest.mark.parametrize("point", ["dlq.rearmed", "dlq.published"])
async def test_an_interrupted_replay_can_be_repeated(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, effects: Effects, point: str
) -> None:
    """An interrupted replay loses nothing, and the next one takes effect once."""

    class Cut(Exception):
        pass

    def cut(passed: str) -> None:
        if passed == point:
            raise Cut

    expected = await put_many(channel, 3)
    with pytest.raises(Cut):
        await go_over(in_queue(pool, rabbitmq_url, signals=Signals(cut)), DeadLetterAction.REPLAY)
    await holds(channel, 3)
    await holds(channel, 3 if point == "dlq.published" else 0, QUEUE)
    async with consuming(rabbitmq_url, effects.consumer()):
        assert (await go_over(in_queue(pool, rabbitmq_url), DeadLetterAction.REPLAY))[0].matched == 3
        await holds(channel, 0)
        await holds(channel, 0, QUEUE)
        await effects.arrive(3)
    assert sorted(str(message_id) for message_id in await effects.committed()) == sorted(expected)


async def test_only_one_scan_runs_at_a_time(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """A second scan is refused while one runs, so each scan sees all letters."""
    await put_many(channel, 2)
    async with scan(pool, rabbitmq_url) as other:
        assert len(await other.take(10)) == 2
        with pytest.raises(DeadLettersBusy):
            await ids(letters)
    assert len(await ids(letters)) == 2


async def test_a_missing_message_ends_the_scan(pool: db.Pool, channel: AbstractChannel, rabbitmq_url: str) -> None:
    """A scan ends if a message that it counted does not arrive."""
    expected = await put_many(channel, 3)
    dlq = await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
    async with scan(pool, rabbitmq_url) as running:
        assert len(await running.take(2)) == 2
        await dlq.purge()
        assert len(await running.take(2)) == 1
        running.depth = 4
        assert await running.take(2) == []
    await holds(channel, 3)
    assert await drained(channel) == expected


@pytest.mark.parametrize("url", ["amqp://127.0.0.1:1/", "amqp://orders:wrong@{}"])
async def test_an_unusable_broker_is_unavailable(pool: db.Pool, rabbitmq_url: str, url: str) -> None:
    """A broker that cannot be reached, or refuses the user, raises BrokerUnavailable."""
    with pytest.raises(BrokerUnavailable):
        await ids(in_queue(pool, url.format(rabbitmq_url.rpartition("@")[2])))


async def test_a_broker_killed_during_a_scan_loses_nothing(pool: db.Pool, server_directory: Path) -> None:
    """A broker that is killed during a scan keeps all dead letters."""
    async with servers.rabbitmq(server_directory) as broker:

        async def cut_short() -> None:
            async with scan(pool, broker.url()) as running:
                assert len(await running.take(1)) == 1
                await broker.kill()
                while await running.take(1):
                    pass

        async with open_channel(broker.url()) as channel:
            expected = await put_many(channel, 3)
            await broker.sync()
        with pytest.raises(BrokerUnavailable):
            await cut_short()
        await broker.start()
        letters = in_queue(pool, broker.url())

        async def all_back() -> bool:
            with contextlib.suppress(BrokerUnavailable, DeadLettersBusy):  # the latter: by a look that was given up
                return await ids(letters) == expected
            return False

        await wait_until(all_back, AMPLE_SECONDS, "all dead letters")

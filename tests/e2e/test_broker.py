"""The whole service while its broker is killed, its link lies and its relays freeze: no event is lost, doubled, stuck.

A queue that hears everything judges beside the ledger: what is marked published was heard, under one id, in order.
"""

import asyncio
import itertools
import random
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from app.messaging.topology import EXCHANGE
from chaos.proxy import amqp
from chaos.proxy.faults import Double, Eat, Lose, Overtake
from chaos.proxy.proxy import Proxy
from tests.e2e.conftest import System, client, order
from tests.harness import servers
from tests.harness.messages import HEARD, open_channel
from tests.harness.processes import Service
from tests.harness.queues import QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

PER_SECOND = 20  # orders
CONFIRMED = ("confirmed", None)


@pytest.fixture
async def broker(server_directory: Path) -> AsyncIterator[servers.Broker]:
    """A broker of this test's own, to be killed."""
    async with servers.rabbitmq(server_directory) as server:
        yield server


async def placed_more(keys: list[str]) -> None:
    """Wait until a second's load more has been answered."""
    least = len(keys) + PER_SECOND
    await wait_until(lambda: len(keys) >= least, AMPLE_SECONDS, "more orders")


async def publishes(system: System) -> None:
    """Wait until an event is published that was not before."""

    async def published() -> int:
        count: int = await system.pool.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL")
        return count

    before = await published()

    async def is_publishing() -> bool:
        return await published() > before

    await wait_until(is_publishing, AMPLE_SECONDS, "a confirm")


async def test_orders_are_taken_and_confirmed_while_the_broker_is_killed_again_and_again(
    system: System, broker: servers.Broker
) -> None:
    system.env = {**system.env, "ORDERS_RABBITMQ_URL": broker.url()}
    await system.hear()
    intake, _ = [await system.start(), await system.start()]
    await system.place([intake], "first", order())
    await system.all_ended()
    await broker.sync()
    async with system.load(intake, PER_SECOND) as keys:
        for _ in range(3):
            await placed_more(keys)
            await broker.kill()
            await placed_more(keys)
            await broker.start()
            await publishes(system)
    await system.all_ended()
    assert await system.parked() == 0
    assert await system.statuses() == {CONFIRMED}
    assert await system.violations() == []


async def test_confirms_and_acknowledgements_are_swallowed_deliveries_doubled_and_overtaken(
    system: System, rabbitmq_url: str
) -> None:
    await system.hear()
    parts = urlsplit(rabbitmq_url)
    dice = random.Random(5)  # noqa: S311 - the same in every run is what is wanted
    faults = (
        Eat(amqp.CONFIRM, probability=0.2, times=10),
        Lose(amqp.CONFIRM, probability=0.2, times=5),
        Eat(amqp.ACKNOWLEDGEMENT, probability=0.2),
        Double(amqp.DELIVERY, probability=0.3),
        Overtake(amqp.DELIVERY, probability=0.3),
    )
    async with Proxy(parts.hostname or "", parts.port or 0, frames=amqp, dice=dice) as proxy:
        proxied = proxy.url(rabbitmq_url)
        services = [await system.start(rabbitmq_url=proxied), await system.start(rabbitmq_url=proxied)]
        for fault in faults:
            proxy.arm(fault)
        await asyncio.gather(*(system.place(services, f"key-{number}", order()) for number in range(60)))
        more = itertools.count()

        async def all_struck() -> bool:
            """Place one more: the broker confirms many at once, so chances are few while there are many."""
            await system.place(services, f"more-{next(more)}", order())
            return all(proxy.struck[fault] for fault in faults)

        await wait_until(all_struck, AMPLE_SECONDS, "every fault")
        proxy.disarm()
        proxy.cut()  # so that what was not acknowledged comes again
        await system.all_ended()
        assert await system.parked() == 0
        assert await system.statuses() == {CONFIRMED}
        assert await system.violations() == []
        for service in services:
            assert await service.terminate() == 0


async def test_orders_go_on_when_the_binding_is_deleted_in_the_middle_of_them(system: System) -> None:
    """Without our listener: a message that any queue takes is not returned."""
    service = await system.start(outbox_backoff_base_seconds="0.1")
    async with system.load(service, PER_SECOND) as keys, open_channel(system.env["ORDERS_RABBITMQ_URL"]) as channel:
        queue = await channel.get_queue(QUEUE)
        for _ in range(3):
            await placed_more(keys)
            await queue.unbind(EXCHANGE, "order.placed")
        await wait_until(lambda: has_returned(service), AMPLE_SECONDS, "a returned message")
    await system.all_ended()
    assert await system.parked() == 0
    assert await system.statuses() == {CONFIRMED}
    assert await system.violations() == []


async def has_returned(service: Service) -> bool:
    async with client(service.url) as http:
        return "outbox_returned_total 0.0" not in (await http.get("/metrics")).text


@pytest.mark.parametrize(
    "points",
    [("relay.claimed", "relay.published"), ("relay.published", "relay.claimed", "relay.claimed")],
    ids=["two", "three"],
)
async def test_relays_that_freeze_past_their_leases_and_wake_up_repeat_events_and_change_nothing(
    system: System, points: tuple[str, ...]
) -> None:
    """Every second order is cancelled meanwhile: then both of its events wait, and the later one for the earlier."""
    await system.hear()
    api = await system.start(roles="api")
    frozen = []
    for number, point in enumerate(points):
        relay = await system.start_freezing(point)
        frozen.append(relay)
        placed = [await system.place([api], f"{point}-{number}-{n}", order()) for n in range(6)]
        await wait_until(partial(is_frozen, relay), AMPLE_SECONDS, f"freezing at {point}")
        for each in placed[::2]:
            answer = await system.cancel([api], f"cancel-{each.json()['id']}", each.json()["id"])
            assert answer.status_code == httpx.codes.OK
        await system.end_leases()
    await system.start(roles="relay,consumer")
    await system.all_ended()
    assert await system.statuses() == {CONFIRMED, ("cancelled", "cancelled-by-customer")}
    before = await rows(system)
    for relay in frozen:
        relay.process.send_signal(signal.SIGCONT)
        assert await relay.terminate() == 0
    assert await rows(system) == before
    assert await repeats(system) >= points.count("relay.published")
    assert await system.violations() == []


def is_frozen(service: Service) -> bool:
    return bool(psutil.Process(service.process.pid).status() == psutil.STATUS_STOPPED)


async def repeats(system: System) -> int:
    """Return how many messages were heard beyond one for each event."""
    async with open_channel(system.env["ORDERS_RABBITMQ_URL"]) as channel:
        queue = await channel.declare_queue(HEARD, passive=True)
    events: int = await system.pool.fetchval("SELECT count(*) FROM outbox")
    return (queue.declaration_result.message_count or 0) - events


async def rows(system: System) -> list[tuple[object, ...]]:
    query = "SELECT id, published_at, attempts, parked_at FROM outbox ORDER BY id"
    return [tuple(row) for row in await system.pool.fetch(query)]


async def test_a_service_that_is_told_to_end_while_the_broker_is_silent_leaves_its_rows_to_others_at_once(
    system: System, broker: servers.Broker
) -> None:
    long = {"outbox_lease_seconds": "3600", "outbox_publish_timeout_seconds": "600"}
    system.env = {**system.env, "ORDERS_RABBITMQ_URL": broker.url()}
    leaving = await system.start(shutdown_timeout_seconds="4", **long)
    await system.place([leaving], "first", order())
    await system.all_ended()
    broker.freeze()
    await system.place([leaving], "second", order())
    await wait_until(lambda: is_claimed(system), AMPLE_SECONDS, "claim")
    assert await leaving.terminate() == 0
    assert not await is_claimed(system)
    broker.thaw()
    await system.start(**long)
    await system.all_ended()
    assert await system.statuses() == {CONFIRMED}
    assert await system.violations() == []


async def is_claimed(system: System) -> bool:
    return bool(await system.pool.fetchval("SELECT EXISTS (SELECT FROM outbox WHERE claim_token IS NOT NULL)"))

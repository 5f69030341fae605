"""What clients, brokers, partners and operators do to a running service: never a lost order, never a second one."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import asyncpg
import httpx
import pytest

from tests.e2e.conftest import StartService, System, client, order
from tests.harness import servers
from tests.harness.processes import Service
from tests.harness.wait import AMPLE_SECONDS, wait_until


async def storm(system: System, services: list[Service], keys: list[str]) -> None:
    """Place an order for each key, all at the same time."""
    await asyncio.gather(*(system.place(services, key, order()) for key in keys))


async def test_a_hundred_concurrent_posts_of_one_key_over_two_processes_make_one_order(system: System) -> None:
    services = [await system.start(), await system.start()]
    async with client(services[0].url) as one, client(services[1].url) as other:
        posts = [
            http.post("/orders", json=order(), headers={"Idempotency-Key": "storm"})
            for _ in range(50)
            for http in (one, other)
        ]
        responses = await asyncio.gather(*posts)
    assert {response.status_code for response in responses} == {httpx.codes.CREATED}
    assert len({(response.headers["location"], response.content) for response in responses}) == 1
    assert sum("idempotent-replay" not in response.headers for response in responses) == 1
    assert await system.pool.fetchval("SELECT count(*) FROM orders") == 1
    for response in responses:
        system.answers.add("storm", response)
    await system.all_ended()
    assert await system.violations() == []


async def test_a_hundred_keys_posted_twenty_times_each_make_a_hundred_orders(system: System) -> None:
    """Two thousand requests over two processes: nobody sees an error, and each key has one answer.

    Ten keys at a time, five for each process: as many as it takes without a line, where a slow machine would send some
    home (503). Sent with aiohttp, because httpx's pool looks at every connection for each request.
    """
    services = [await system.start(), await system.start()]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=200)) as http:

        async def post(number: int) -> None:
            key, service = f"key-{number // 20}", services[number % 2]
            headers = {"Idempotency-Key": key}
            async with http.post(f"{service.url}/orders", json=order(), headers=headers) as answer:
                body = await answer.read()
                assert answer.status == httpx.codes.CREATED, body
                system.answers.by_key.setdefault(key, set()).add((answer.headers["Location"], body))

        await asyncio.gather(*(post(number) for number in range(2000)))
    assert {len(told) for told in system.answers.by_key.values()} == {1}
    assert await system.pool.fetchval("SELECT count(*) FROM orders") == 100
    await system.all_ended()
    assert await system.violations() == []


@pytest.fixture
async def broker(server_directory: Path) -> AsyncIterator[servers.Broker]:
    """A broker of this test's own, to be killed."""
    async with servers.rabbitmq(server_directory) as server:
        yield server


async def test_orders_are_taken_while_the_broker_is_dead_and_confirmed_when_it_is_back(
    system: System, broker: servers.Broker
) -> None:
    system.env = {**system.env, "ORDERS_RABBITMQ_URL": broker.url()}
    services = [await system.start(), await system.start()]
    await storm(system, services, ["before"])
    await system.all_ended()
    await broker.sync()
    await broker.kill()
    await storm(system, services, [f"during-{number}" for number in range(20)])
    await wait_until(lambda: is_degraded(services[0]), AMPLE_SECONDS, "readiness without the broker")
    await broker.start()
    await system.all_ended()
    assert await system.pool.fetchval("SELECT count(*) FROM outbox WHERE parked_at IS NOT NULL") == 0
    assert await system.statuses() == {("confirmed", None)}
    assert await system.violations() == []


async def is_degraded(service: Service) -> bool:
    """Tell whether it does its work and says that something is out."""
    async with client(service.url) as http:
        ready = await http.get("/readyz")
    return bool((ready.status_code, ready.json()["status"]) == (httpx.codes.OK, "degraded"))


async def test_partners_that_die_and_come_back_are_asked_again(
    system: System, start_service: StartService, tmp_path: Path
) -> None:
    partners = await start_service({}, ("sandbox", "--ledger", str(tmp_path / "ledger.sqlite")))
    urls = dict.fromkeys(("ORDERS_INVENTORY_URL", "ORDERS_PAYMENT_URL", "ORDERS_SHIPPING_URL"), partners.url)
    system.env = {**system.env, **urls}
    service = await system.start()
    await partners.kill()
    await storm(system, [service], [f"key-{number}" for number in range(5)])
    await wait_until(lambda: not_sent(system.pool), AMPLE_SECONDS, "a call that was not sent")
    await partners.start()
    await system.all_ended()
    assert await system.statuses() == {("confirmed", None)}
    async with client(partners.url) as system.sandbox:
        assert await system.violations() == []


async def not_sent(pool: asyncpg.Pool) -> bool:
    return bool(await pool.fetchval("SELECT EXISTS (SELECT FROM saga_steps WHERE outcome = 'not-sent')"))


async def test_a_process_that_freezes_past_its_leases_and_wakes_up_changes_nothing(system: System) -> None:
    """Frozen with a call under way, it holds the leases of its sagas; another process ends them meanwhile."""
    frozen = await system.start()
    await system.faults({"target": "payment.charge", "kind": "timeout_before"})
    await storm(system, [frozen], [f"key-{number}" for number in range(5)])
    await wait_until(lambda: leased(system.pool, 5), AMPLE_SECONDS, "a call under way, every message acted on")
    frozen.freeze()
    await system.faults()
    await system.start()
    await system.all_ended()
    before = await system.pool.fetch("SELECT id, version FROM sagas ORDER BY id")
    frozen.thaw()
    async with client(frozen.url) as http:
        assert (await http.get("/livez")).status_code == httpx.codes.OK
    assert await frozen.terminate() == 0
    assert await system.pool.fetch("SELECT id, version FROM sagas ORDER BY id") == before
    assert await system.statuses() == {("confirmed", None)}
    assert await system.violations() == []


async def leased(pool: asyncpg.Pool, sagas: int) -> bool:
    query = "SELECT count(*) = $1 AND count(lease_owner) > 0 FROM sagas"
    return bool(await pool.fetchval(query, sagas))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_service_with_0_in_the_middle_of_work_and_another_goes_on(
    system: System, number: signal.Signals
) -> None:
    leaving, staying = await system.start(), await system.start()
    placing = asyncio.create_task(storm(system, [leaving, staying], [f"key-{n}" for n in range(40)]))
    await wait_until(lambda: any_order(system.pool), AMPLE_SECONDS, "the first order")
    assert await leaving.terminate(number=number) == 0
    await placing
    await system.all_ended()
    assert await system.statuses() == {("confirmed", None)}
    assert await system.violations() == []


async def any_order(pool: asyncpg.Pool) -> bool:
    return bool(await pool.fetchval("SELECT EXISTS (SELECT FROM orders)"))

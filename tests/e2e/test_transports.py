"""Processes with different transports beside each other: the later one ends at once, with one line that says why."""

import asyncio
from pathlib import Path

import pytest

from app import db
from app.messaging.rabbitmq.broker import NAME as RABBITMQ
from app.messaging.transport_lease import LEASE_SECONDS, TransportLease
from tests.e2e.conftest import System, client, order
from tests.harness import servers
from tests.harness.wait import AMPLE_SECONDS, wait_until

IN_PROCESS = {"rabbitmq_url": ""}


async def refused(system: System, **settings: str) -> None:
    """Start a service that must end with exit code 2 and one line."""
    with pytest.raises(AssertionError, match="ended with 2 while starting") as caught:
        await system.start(**settings)
    [log] = caught.value.__notes__
    _, line, _ = log.splitlines()
    assert line.startswith("orders: ORDERS_RABBITMQ_URL: ")


async def all_published(system: System) -> bool:
    return bool(await system.pool.fetchval("SELECT bool_and(published_at IS NOT NULL) FROM outbox"))


async def test_a_process_without_the_broker_is_refused_beside_others(system: System) -> None:
    """Every event that is marked as published has reached the broker."""
    await system.hear()
    relay = await system.start()
    await refused(system, **IN_PROCESS)
    for number in range(10):
        await system.place([relay], f"key-{number}", order())
    await system.all_ended()
    assert await system.violations() == []


async def test_the_transport_can_be_changed_when_all_have_stopped(system: System) -> None:
    with_broker = await system.start()
    assert await with_broker.terminate() == 0
    without = await system.start(**IN_PROCESS)
    await wait_until(lambda: "serve.in_process_transport" in without.log.read_text(), AMPLE_SECONDS, "a warning")
    await refused(system)
    await system.place([without], "first", order())
    await wait_until(lambda: all_published(system), AMPLE_SECONDS, "every event handled in the process")
    await without.kill()
    assert await system.transport_lease_seconds() <= LEASE_SECONDS
    await system.let_transport_leases_end_in(3600)
    await refused(system)
    again = await system.start(**IN_PROCESS)  # the killed one had the same transport
    assert await again.terminate() == 0
    await refused(system)
    await system.let_transport_leases_end_in(0)
    await system.start()


async def test_processes_without_the_roles_need_no_transport(system: System) -> None:
    await system.start()
    api = await system.start(roles="api,janitor", **IN_PROCESS)
    await system.place([api], "first", order())
    await system.all_ended()


async def test_a_service_that_meets_another_transport_later_ends(system: System, server_directory: Path) -> None:
    """Postgres is down when it starts, so it cannot know."""
    async with servers.postgres(server_directory) as postgres:
        await asyncio.to_thread(db.migrate, postgres.url)
        await TransportLease(RABBITMQ, "another", 3600).take(postgres.url)
        await postgres.kill()
        service = await system.start(database_url=postgres.url, **IN_PROCESS)
        async with client(service.url) as http:
            answer = await http.get("/readyz")
        rows = {row["name"]: row for row in answer.json()["checks"]}
        assert (rows["postgres"]["status"], rows["transport"]["status"]) == ("down", "degraded")
        assert rows["transport"]["detail"] == "the lease of the transport in-process is not held"
        await postgres.start()
        await wait_until(lambda: service.process.poll() is not None, AMPLE_SECONDS, "end of the service")
        assert service.process.wait() == 2
        assert service.log.read_text().splitlines()[-1].startswith("orders: ORDERS_RABBITMQ_URL: ")

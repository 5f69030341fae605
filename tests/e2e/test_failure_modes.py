"""Each failure is provoked for real, and then looks as the table says: to support, in metrics and in alerts."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.messaging.topology import EXCHANGE
from chaos.proxy import postgres
from chaos.proxy.faults import Blackhole
from chaos.proxy.proxy import Proxy
from tests.e2e.conftest import System, client, order
from tests.harness import servers
from tests.harness.failure_modes import MODES, FailureMode
from tests.harness.messages import open_channel
from tests.harness.processes import REPOSITORY, Service
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE, ROUTING_KEYS
from tests.harness.wait import AMPLE_SECONDS, wait_until

RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yml"
REFUSED_BY_THE_DATABASE = "ALTER TABLE sagas ADD CONSTRAINT refuse_all CHECK (false) NOT VALID"
# `orders_unstarted` counts orders that are two minutes old. `resends` keeps the janitor from sending the event again.
LONG_UNSTARTED = """
    UPDATE orders SET placed_at = placed_at - interval '10 min';
    UPDATE outbox
    SET published_at = published_at - interval '10 min', pending_since = pending_since - interval '10 min', resends = 20
"""
PATIENT = {
    "partner_retry_base_seconds": "20",
    "partner_retry_cap_seconds": "20",
    "partner_circuit_failures": "1000000",
}
CHARGE_FAILS = {"target": "payment.charge", "kind": "unavailable"}

Failed = tuple[Service, str]  # a service that shows the failure, and the order that suffers from it
Provoke = Callable[[System, Path], contextlib.AbstractAsyncContextManager[Failed]]


async def place(service: Service, body: dict[str, Any] | None = None) -> str:
    async with client(service.url) as http:
        response = await http.post("/orders", json=body or order())
        assert response.status_code == httpx.codes.CREATED, response.text
        return str(response.json()["id"])


async def start_and_place(system: System, body: dict[str, Any] | None = None, /, **settings: str) -> Failed:
    service = await system.start(**settings)
    return service, await place(service, body)


@contextlib.asynccontextmanager
async def broker_down(system: System, directory: Path) -> AsyncIterator[Failed]:
    async with servers.rabbitmq(directory) as broker:
        service = await system.start(rabbitmq_url=broker.url())
        await place(service)
        await system.all_ended()
        await broker.kill()
        yield service, await place(service)


@contextlib.asynccontextmanager
async def parked_row(system: System, _: Path) -> AsyncIterator[Failed]:
    service = await system.start(outbox_max_attempts="1")
    await place(service)
    await system.all_ended()  # so the queue is bound, and will not be bound again
    async with open_channel(system.env["ORDERS_RABBITMQ_URL"]) as channel:
        queue = await channel.get_queue(QUEUE)
        for key in ROUTING_KEYS:
            await queue.unbind(EXCHANGE, key)
    yield service, await place(service)


@contextlib.asynccontextmanager
async def dead_letter(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.pool.execute(REFUSED_BY_THE_DATABASE)
    yield await start_and_place(system, inbox_max_attempts="1")


@contextlib.asynccontextmanager
async def dead_letter_lost(system: System, directory: Path) -> AsyncIterator[Failed]:
    async with dead_letter(system, directory) as failed:

        async def is_lost() -> bool:
            async with open_channel(system.env["ORDERS_RABBITMQ_URL"]) as channel:
                purged = await (await channel.get_queue(DEAD_LETTER_QUEUE)).purge()
                return bool(purged.message_count)

        await wait_until(is_lost, AMPLE_SECONDS, "the dead letter")
        await system.pool.execute(LONG_UNSTARTED)
        yield failed


@contextlib.asynccontextmanager
async def partner_down(system: System, _: Path) -> AsyncIterator[Failed]:
    service = await system.start(**PATIENT)
    await system.sandbox_process.kill()
    yield service, await place(service)


@contextlib.asynccontextmanager
async def circuit_open(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults(CHARGE_FAILS)
    service = await system.start(partner_circuit_failures="1", partner_circuit_open_seconds="3600")
    await place(service)
    [mode] = [mode for mode in MODES if mode.name == "circuit open"]
    async with client(service.url) as http:
        await wait_until(lambda: is_counted(http, mode), AMPLE_SECONDS, "an open circuit")
    yield service, await place(service)


@contextlib.asynccontextmanager
async def unknown_charge(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults(
        {"target": "payment.charge", "kind": "timeout_after"}, {"target": "payment.charge", "kind": "error"}
    )
    yield await start_and_place(system, **PATIENT)


@contextlib.asynccontextmanager
async def undo_failing(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults({"target": "payment.refund", "kind": "unavailable"})
    yield await start_and_place(system, order("UNDELIVERABLE"), **PATIENT)


@contextlib.asynccontextmanager
async def operator_needed(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults({"target": "payment.refund", "kind": "unavailable"})
    yield await start_and_place(system, order("UNDELIVERABLE"), saga_needs_operator_seconds="1")


@contextlib.asynccontextmanager
async def no_consumer(system: System, _: Path) -> AsyncIterator[Failed]:
    everything, _id = await start_and_place(system)
    await system.all_ended()
    await everything.kill()
    yield await start_and_place(system, roles="api,relay")


@contextlib.asynccontextmanager
async def no_relay(system: System, _: Path) -> AsyncIterator[Failed]:
    yield await start_and_place(system, roles="api")


@contextlib.asynccontextmanager
async def database_slow(system: System, _: Path) -> AsyncIterator[Failed]:
    url = system.env["ORDERS_DATABASE_URL"]
    parts = urlsplit(url)
    async with Proxy(parts.hostname or "", parts.port or 0, frames=postgres) as proxy:
        impatient = {"database_pool_wait_seconds": "0.5", "database_statement_seconds": "0.5"}
        service, order_id = await start_and_place(system, database_url=proxy.url(url), roles="api", **impatient)
        proxy.arm(Blackhole())
        yield service, order_id
        proxy.disarm()


@contextlib.asynccontextmanager
async def hold_expired(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults({"target": "inventory.commit", "kind": "refuse"})
    yield await start_and_place(system)


@contextlib.asynccontextmanager
async def deadline_passed(system: System, _: Path) -> AsyncIterator[Failed]:
    await system.faults({"target": "shipping.create", "kind": "unavailable"})
    yield await start_and_place(system, saga_deadline_seconds="1")


@contextlib.asynccontextmanager
async def card_declined(system: System, _: Path) -> AsyncIterator[Failed]:
    yield await start_and_place(system, order(payment_method="pm_card_declined"))


PROVOKE: dict[str, Provoke] = {
    "broker down": broker_down,
    "parked row": parked_row,
    "dead letter": dead_letter,
    "dead letter lost": dead_letter_lost,
    "partner down": partner_down,
    "circuit open": circuit_open,
    "unknown charge": unknown_charge,
    "undo failing": undo_failing,
    "operator needed": operator_needed,
    "no consumer": no_consumer,
    "no relay": no_relay,
    "database slow": database_slow,
    "hold expired": hold_expired,
    "deadline passed": deadline_passed,
    "card declined": card_declined,
}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name.replace(" ", "-"))
async def test_each_failure_is_seen(system: System, server_directory: Path, mode: FailureMode) -> None:
    """The timeline says what the order waits for, or why it ended; the metric counts it; the alert exists."""
    async with PROVOKE[mode.name](system, server_directory) as (service, order_id), client(service.url) as http:
        await wait_until(lambda: is_shown(http, mode, order_id), AMPLE_SECONDS, f"the timeline of: {mode.name}")
        await wait_until(lambda: is_counted(http, mode), AMPLE_SECONDS, f"{mode.metric} of: {mode.name}")
    alerts = {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert mode.because or mode.alert in alerts


async def is_shown(http: httpx.AsyncClient, mode: FailureMode, order_id: str) -> bool:
    """Return whether the timeline and the order say what the table says."""
    response = await http.get(f"/orders/{order_id}/timeline")
    if mode.answer is not None:
        return response.is_error and response.json()["code"] == mode.answer
    why = response.raise_for_status().json()["why_stuck"]
    if mode.waiting_for is None:
        found = (await http.get(f"/orders/{order_id}")).raise_for_status().json()
        return why is None and found["status_reason"] == mode.status_reason
    return why is not None and why["waiting_for"] == mode.waiting_for and (mode.says or "") in why["message"]


async def is_counted(http: httpx.AsyncClient, mode: FailureMode) -> bool:
    """Return whether the metric is at least 1."""
    text = (await http.get("/metrics")).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    matching = [
        sample.value
        for sample in samples
        if sample.name == mode.metric and mode.labels.items() <= sample.labels.items()
    ]
    return sum(matching) >= 1


def test_every_mode_is_provoked() -> None:
    """The table has no row that nothing provokes, and each names an alert or says why there is none."""
    assert list(PROVOKE) == [mode.name for mode in MODES]
    assert all((mode.alert is None) is (mode.because is not None) for mode in MODES)

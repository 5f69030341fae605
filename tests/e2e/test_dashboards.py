"""Every query of every dashboard has values, and they move when what the panel asks about goes wrong."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool
from app.messaging.topology import EXCHANGE
from tests.e2e.conftest import System, client, order
from tests.harness import planting
from tests.harness.dashboards import Target, Watch, targets
from tests.harness.dead_letters import send
from tests.harness.messages import open_channel
from tests.harness.operating import pause_partner
from tests.harness.processes import Service
from tests.harness.prometheus import Prometheus
from tests.harness.queues import QUEUE, ROUTING_KEYS
from tests.harness.wait import wait_until

MOVED_SECONDS = 60.0
BLOCKED_SECONDS = 3
SETTINGS = {
    "saga_deadline_seconds": "4",
    "inventory_hold_seconds": "300",
    "saga_needs_operator_seconds": "1",
    "partner_circuit_failures": "3",
    "partner_circuit_open_seconds": "2",
    "inbox_max_attempts": "2",
    "outbox_max_attempts": "1",
    "outbox_max_pending": "10",
}

# Queries without a series until something goes wrong.
EMPTY_WHEN_CALM = {"Which alerts fire?", "What share of the responses is an error of the service?"}
FALL = {
    "Are orders taken, and do they end?",
    "What share of the orders ends as it should?",
    "How many events are published?",
    "What share of the charges succeeds?",
    "Does every process answer?",
}
# Panels or legends whose failure is not provoked here, because that takes a minute or more: what else tests it.
ONLY_SHOWN = {
    "Are log lines or spans lost?": "test_log_reader, test_traces",
    "What does the janitor delete?": "test_pruner",
    "Can the janitor not prune a table?": "test_pruner",
    "sent again": "test_resender",
    "processed": "no failure",
    "Is an invariant violated?": "test_verify_janitor; the janitor judges an order when it is a minute old",
    "When was each invariant checked last?": "it rises by itself",
}


class Failures:
    """A system whose roles are processes of their own, what can go wrong with it, and what the dashboards show."""

    def __init__(self, system: System, services: Mapping[str, Service], watch: Watch) -> None:
        self.system, self.services, self.watch = system, services, watch
        self.pool = cast("Pool", system.pool)
        self._placed = 0

    async def place(self, number: int) -> list[int]:
        """Place orders at once; return the statuses of the responses."""
        self._placed += number
        keys = [f"order-{self._placed - place}" for place in range(number)]
        return [response.status_code for response in await self.post(*((key, order()) for key in keys))]

    async def post(self, *orders: tuple[str, Mapping[str, Any]]) -> list[httpx.Response]:
        """Send orders at once, each with its key."""
        async with client(self.services["api"].url) as http, asyncio.TaskGroup() as group:
            sent = [
                group.create_task(http.post("/orders", json=body, headers={"Idempotency-Key": key}))
                for key, body in orders
            ]
        return [task.result() for task in sent]

    async def shown(self, panel: str) -> None:
        """Wait until a panel shows a failure."""
        shown = [target for target in self.watch.targets if target.panel == panel and not is_only_shown(target)]

        async def has_risen() -> bool:
            await self.watch.look(shown)
            return all(map(self.watch.has_risen, shown))

        await wait_until(has_risen, MOVED_SECONDS, panel)

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[AbstractChannel]:
        async with open_channel(self.system.env["ORDERS_RABBITMQ_URL"]) as channel:
            yield channel

    async def repeat_requests(self) -> None:
        """Send one order twice, then another order with its key."""
        for body in (order(), order(), order("GADGET")):
            await self.post(("repeated", body))

    async def lose_holds(self) -> None:
        """Let a partner forget what it holds."""
        await self.system.faults({"target": "inventory.commit", "kind": "refuse", "times": 3})
        await self.place(3)
        await self.shown("What share of the orders lost its stock?")

    async def break_messages(self) -> None:
        """Deliver a message that cannot be read, one that cannot be handled, and one for the second time."""
        async with self.channel() as channel:
            await send(channel, b"no JSON", message_id="unreadable")
        async with planting.failing_handler(self.pool):
            await self.place(1)
            await self.shown("Are there dead letters?")
        await planting.publish_again(self.pool)

    async def break_partners(self) -> None:
        """Let neither charges nor refunds succeed, and holds take long."""
        slow = {"target": "inventory.hold", "kind": "slow", "delay_seconds": 0.4}
        await self.system.faults({**slow, "delay_seconds": 1.0})
        await self.place(3)
        await self.shown("How long does an order take?")
        await self.system.faults(
            slow, *({"target": f"payment.{call}", "kind": "error"} for call in ("charge", "refund"))
        )
        await self.place(5)
        await self.shown("Does a saga need an operator?")
        await self.shown("Does an undo fail?")  # counted by the consumer, which is killed next

    async def pause_shipping(self) -> None:
        """Let an operator pause a partner."""
        await pause_partner(self.pool, "shipping")
        await self.shown("Has an operator paused a partner?")

    async def block_requests(self) -> None:
        """Let requests wait for Postgres for some seconds, and a transaction stay open meanwhile."""
        async with self.pool.acquire() as conn, conn.transaction(isolation="repeatable_read"):
            await planting.leave_dead_tuples(self.pool)
            await conn.execute("LOCK TABLE orders IN EXCLUSIVE MODE")
            placing = asyncio.create_task(self.place(8))
            await self.shown("How many connections are in use?")
            await self.watch.prometheus.wait_for_scrape(f"database_oldest_snapshot_age_seconds > {BLOCKED_SECONDS}")
        await placing
        await self.shown("How long does a client wait for its order?")

    async def end_processes(self) -> None:
        """Leave messages in the queue, let the broker refuse an event, and leave others until no order is accepted."""
        await self.services["consumer"].kill()
        await self.place(4)
        await self.shown("How many messages wait for a consumer?")
        async with self.channel() as channel:
            queue = await channel.get_queue(QUEUE)
            for key in ROUTING_KEYS:
                await queue.unbind(EXCHANGE, key)
            await self.place(1)
            await self.shown("Has the broker refused an event for good?")
            await self.shown("Why are events not published at once?")
        self.services["relay"].freeze()

        async def refuses() -> bool:
            return 503 in await self.place(2)

        await wait_until(refuses, MOVED_SECONDS, "a refused order")
        await planting.make_overdue(self.pool)


@pytest.fixture
async def failures(system: System, server_directory: Path) -> AsyncIterator[Failures]:
    """Each role in a process of its own, below a Prometheus."""
    services = {role: await system.start(roles=role, **SETTINGS) for role in ("api", "relay", "consumer", "janitor")}
    async with Prometheus(server_directory, [service.port for service in services.values()]) as prometheus:
        yield Failures(system, services, Watch(prometheus, targets()))


async def test_panels_show_what_goes_wrong(failures: Failures) -> None:
    """Each query has values while all is well, and moves when what its panel asks about goes wrong."""
    watch = failures.watch

    async def is_calm() -> bool:
        await failures.place(1)
        return {target.panel for target in await watch.begin()} <= EMPTY_WHEN_CALM

    await wait_until(is_calm, MOVED_SECONDS, "values of every query")
    await failures.repeat_requests()
    await failures.lose_holds()
    await failures.break_messages()
    await failures.block_requests()
    await failures.break_partners()
    await failures.pause_shipping()
    await failures.end_processes()

    async def all_moved() -> bool:
        await failures.place(1)  # refused: the service counts more of them
        await watch.look(watch.targets)
        return not unmoved(watch)

    with contextlib.suppress(AssertionError):
        await wait_until(all_moved, MOVED_SECONDS, "")
    assert not unmoved(watch), "\n".join(unmoved(watch))


def unmoved(watch: Watch) -> list[str]:
    """Return the queries that do not show what was provoked."""
    return [str(target) for target in watch.targets if not shows(watch, target)]


def is_only_shown(target: Target) -> bool:
    """Return whether no failure of this query is provoked here."""
    return target.panel in ONLY_SHOWN or target.legend in ONLY_SHOWN


def shows(watch: Watch, target: Target) -> bool:
    """Return whether the query has moved as it should when all failures have been provoked."""
    if is_only_shown(target):
        return bool(watch.shown[target])
    return watch.has_fallen(target) if target.panel in FALL else watch.has_risen(target)

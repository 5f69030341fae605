"""The whole system as a user runs it: service processes, real Postgres and RabbitMQ, the sandbox as a process."""

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.harness.checker import FINAL, Answers, is_too_late, violations
from tests.harness.events import PLACED
from tests.harness.messages import everything_heard, start_hearing
from tests.harness.ports import free_port
from tests.harness.processes import Service
from tests.harness.wait import AMPLE_SECONDS, wait_until

StartService = Callable[..., Awaitable[Service]]
StartDemo = Callable[..., Awaitable[Service]]

ENDED_SECONDS = 90.0
# A dead process's work is taken over when its lease ends, and one call at a time finds out that a partner is back:
# short times, so that the tests need not wait long.
SETTINGS = {
    "ORDERS_OUTBOX_LEASE_SECONDS": "1.5",
    "ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS": "1",
    "ORDERS_SAGA_LEASE_SECONDS": "1.5",
    "ORDERS_PARTNER_TIMEOUT_SECONDS": "0.5",
    "ORDERS_PARTNER_RETRY_BASE_SECONDS": "0.05",
    "ORDERS_PARTNER_RETRY_CAP_SECONDS": "0.5",
    "ORDERS_PARTNER_CIRCUIT_OPEN_SECONDS": "0.1",
    "ORDERS_LOG_FORMAT": "console",
    # A machine that stalls is no outage: where every POST must be answered with 201, a pause must not make it a 503.
    "ORDERS_DATABASE_POOL_WAIT_SECONDS": "30",
    "ORDERS_DATABASE_STATEMENT_SECONDS": "30",
    "ORDERS_IDEMPOTENCY_WAIT_SECONDS": "30",
}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # spares loading certificates for each client


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=60, verify=NO_TLS, trust_env=False, limits=httpx.Limits(max_connections=200)
    )


def order(sku: str = "WIDGET", **more: Any) -> dict[str, Any]:
    return {"items": [{"sku": sku, "quantity": 3, "unit_price": "9.99"}], **more}


@dataclass
class System:
    """What one test runs and looks at."""

    env: Mapping[str, str]
    start_service: StartService
    pool: asyncpg.Pool
    sandbox: httpx.AsyncClient
    sandbox_process: Service
    answers: Answers = field(default_factory=Answers)
    hears: bool = False

    async def start(self, **more: str) -> Service:
        """Start one more `orders serve`; `more` are settings, such as `roles="api"`."""
        return await self.start_service(
            {**self.env, **{f"ORDERS_{name.upper()}": value for name, value in more.items()}}
        )

    async def start_crashing(self, point: str) -> Service:
        """Start a service that kills itself at the checkpoint."""
        return await self.start_service(dict(self.env), (point,), "tests.harness.crashing")

    async def start_freezing(self, point: str) -> Service:
        """Start a relay that freezes when it first passes the checkpoint, until it gets SIGCONT.

        Its leases end when the test says so; awake again it has ample time to publish what it holds.
        """
        patient = {"ORDERS_OUTBOX_LEASE_SECONDS": "3600", "ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS": "60"}
        env = {**self.env, **patient, "ORDERS_ROLES": "relay"}
        return await self.start_service(env, (point, "SIGSTOP"), "tests.harness.crashing")

    async def end_leases(self) -> None:
        """Let every event that a relay holds be anybody's."""
        await self.pool.execute("UPDATE outbox SET next_attempt_at = clock_timestamp() WHERE claim_token IS NOT NULL")

    async def transport_lease_seconds(self) -> float:
        """Return how long the longest transport lease still counts."""
        query = "SELECT extract(epoch FROM max(expires_at) - clock_timestamp())::float8 FROM transport_leases"
        return float(await self.pool.fetchval(query))

    async def let_transport_leases_end_in(self, seconds: float) -> None:
        """Change when the leases of the killed end, so that no test depends on how quick it is."""
        query = "UPDATE transport_leases SET expires_at = clock_timestamp() + make_interval(secs => $1)"
        await self.pool.execute(query, seconds)

    async def hear(self) -> None:
        """Keep every event from now on, for `violations` to judge."""
        await start_hearing(self.env["ORDERS_RABBITMQ_URL"])
        self.hears = True

    @contextlib.asynccontextmanager
    async def load(self, service: Service, per_second: float) -> AsyncIterator[list[str]]:
        """Place orders at a steady rate, each with one request that must be answered with 201; lend their keys."""
        keys: list[str] = []
        over = asyncio.Event()

        async def place_one(http: httpx.AsyncClient, key: str) -> None:
            self.answers.add(key, await http.post("/orders", json=order(), headers={"Idempotency-Key": key}))
            keys.append(key)

        async def place_many() -> None:
            async with client(service.url) as http, asyncio.TaskGroup() as group:
                for number in itertools.count():
                    if over.is_set():
                        return
                    group.create_task(place_one(http, f"load-{number}"))
                    await asyncio.sleep(1 / per_second)

        placing = asyncio.create_task(place_many())
        try:
            yield keys
        finally:
            over.set()
            await placing

    async def faults(self, *rules: Mapping[str, Any]) -> None:
        (await self.sandbox.put("/faults", json=rules)).raise_for_status()

    async def place(self, services: Iterable[Service], key: str, body: Mapping[str, Any]) -> httpx.Response:
        """Post as a stubborn client does: with the same key, to each service in turn, until one answers 201."""
        while True:
            for service in services:
                async with client(service.url) as http:
                    try:
                        response = await http.post("/orders", json=body, headers={"Idempotency-Key": key})
                    except httpx.TransportError:
                        continue
                if response.status_code == httpx.codes.CREATED:
                    self.answers.add(key, response)
                    return response
                assert response.status_code in {httpx.codes.CONFLICT, httpx.codes.SERVICE_UNAVAILABLE}, response.text
            await asyncio.sleep(0.05)  # a client's pause between two rounds

    async def cancel(self, services: Iterable[Service], key: str, order_id: str) -> httpx.Response:
        """Cancel as a stubborn client does, until there is a clear answer: 200, 202, or that it is too late."""
        while True:
            for service in services:
                async with client(service.url) as http:
                    try:
                        response = await http.post(f"/orders/{order_id}/cancel", headers={"Idempotency-Key": key})
                    except httpx.TransportError:
                        continue
                if response.is_success or is_too_late(response):
                    self.answers.add_cancel(order_id, response)
                    return response
                assert response.status_code in {httpx.codes.CONFLICT, httpx.codes.SERVICE_UNAVAILABLE}, response.text
            await asyncio.sleep(0.05)  # a client's pause between two rounds

    async def all_ended(self) -> None:
        """Wait until every order has a final status, and every event is out and handled."""
        await wait_until(self._is_quiet, ENDED_SECONDS, "end of every order")

    async def _is_quiet(self) -> bool:
        unfinished: int = await self.pool.fetchval(
            """
            SELECT (SELECT count(*) FROM orders WHERE status <> ALL($1))
                 + (SELECT count(*) FROM outbox WHERE published_at IS NULL)
                 + (SELECT count(*) FROM sagas WHERE finished_at IS NULL)
                 + (SELECT count(*) FROM outbox WHERE type = $2 AND NOT EXISTS (
                        SELECT FROM inbox WHERE message_id = outbox.id::text AND processed_at IS NOT NULL))
            """,
            FINAL,
            PLACED,
        )
        return unfinished == 0

    async def has_come(self, order_id: str, lines: int) -> bool:
        """Tell whether the order's saga has come so far on its way forward, or has ended.

        Four steps are attempted, and done: eight lines of the log, without those of attempts that came to nothing.
        """
        query = """
            SELECT count(DISTINCT (step, outcome)) >= $2 OR (SELECT status FROM orders WHERE id = $1) = ANY($3)
            FROM saga_steps WHERE saga_id = $1 AND action = 'do' AND outcome IN ('attempted', 'done')
        """
        return bool(await self.pool.fetchval(query, order_id, lines, FINAL))

    async def statuses(self) -> set[tuple[str, str | None]]:
        rows = await self.pool.fetch("SELECT DISTINCT status, status_reason FROM orders")
        return {(row["status"], row["status_reason"]) for row in rows}

    async def violations(self, free_at_first: Mapping[str, int] | None = None) -> list[str]:
        heard = await everything_heard(self.env["ORDERS_RABBITMQ_URL"]) if self.hears else None
        return await violations(self.env["ORDERS_DATABASE_URL"], self.sandbox, self.answers, heard, free_at_first)

    async def parked(self) -> int:
        parked: int = await self.pool.fetchval("SELECT count(*) FROM outbox WHERE parked_at IS NOT NULL")
        return parked


@pytest.fixture
def start_demo(start_service: StartService, server_directory: Path) -> StartDemo:
    """Start the demo with data of its own, on free ports. Its log says where everything is."""

    async def start(**env: str) -> Service:
        ports = ("--sandbox-port", str(free_port()), "--playground-port", str(free_port()))
        demo = await start_service(env, ("demo", "--data-dir", str(server_directory / "demo"), *ports))
        await wait_until(lambda: "Press Ctrl-C" in demo.log.read_text(), AMPLE_SECONDS, "the welcome")
        return demo

    return start


@pytest.fixture
async def system(
    database_url: str, redis_url: str, rabbitmq_url: str, pool: asyncpg.Pool, start_service: StartService
) -> AsyncIterator[System]:
    """Databases, a vhost and a sandbox, as yet without a service."""
    sandbox = await start_service({}, ("sandbox",))
    env = {
        **SETTINGS,
        "ORDERS_DATABASE_URL": database_url,
        "ORDERS_REDIS_URL": redis_url,
        "ORDERS_RABBITMQ_URL": rabbitmq_url,
        **dict.fromkeys(("ORDERS_INVENTORY_URL", "ORDERS_PAYMENT_URL", "ORDERS_SHIPPING_URL"), sandbox.url),
    }
    async with client(sandbox.url) as http:
        yield System(env, start_service, pool, http, sandbox)

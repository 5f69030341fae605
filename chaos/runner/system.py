"""The system under test: private servers, the partner sandbox, and service processes for each role.

Every process belongs to the run and ends with it. Service processes reach Postgres and RabbitMQ through proxies that
can cut, slow and falsify their connections; the judge reaches the servers directly.
"""

import asyncio
import contextlib
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import httpx

from chaos.proxy import amqp, postgres
from chaos.proxy.proxy import Proxy
from chaos.runner import release
from chaos.runner.broker import Broker
from chaos.runner.pair import Pair
from tests.harness import clocks, installed
from tests.harness.clocks import Clock
from tests.harness.commands import orders
from tests.harness.disks import Disk
from tests.harness.processes import Service

PROCESSES = {"api": 2, "relay": 2, "consumer": 2, "janitor": 1}
DEADLINE_SECONDS = 12.0  # short enough that some orders are late
SETTINGS = {
    # A dead process's work is taken over when its lease ends; a frozen one wakes up after its lease has ended.
    "ORDERS_OUTBOX_LEASE_SECONDS": "3",
    "ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS": "1",
    "ORDERS_SAGA_LEASE_SECONDS": "3",
    "ORDERS_PARTNER_TIMEOUT_SECONDS": "1",
    "ORDERS_PARTNER_RETRY_BASE_SECONDS": "0.1",
    "ORDERS_PARTNER_RETRY_CAP_SECONDS": "2",
    "ORDERS_PARTNER_CIRCUIT_OPEN_SECONDS": "1",
    "ORDERS_SAGA_DEADLINE_SECONDS": f"{DEADLINE_SECONDS:g}",
    "ORDERS_LOG_FORMAT": "json",
}
RESTART_SECONDS = 120.0
QUIET = """
    SELECT NOT EXISTS (SELECT FROM outbox WHERE published_at IS NULL)
       AND NOT EXISTS (SELECT FROM sagas WHERE finished_at IS NULL)
       AND NOT EXISTS (SELECT FROM orders WHERE status IN ('pending', 'compensating'))
       -- The message of an order that was cancelled before its saga started may still be on its way.
       AND NOT EXISTS (
           SELECT FROM outbox WHERE type = 'orders.order.placed.v1' AND NOT EXISTS (
               SELECT FROM inbox WHERE message_id = outbox.id::text AND processed_at IS NOT NULL))
"""


@dataclass(frozen=True)
class Clocks:
    """The clocks that can jump."""

    postgres: Clock
    partners: Clock
    services: list[Clock]  # one for each process


@dataclass
class System:
    """Everything that faults can reach."""

    directory: Path  # of the run
    postgres: Pair
    redis: installed.Redis
    rabbitmq: Broker
    sandbox: Service
    postgres_link: Proxy
    rabbitmq_link: Proxy
    roles: dict[str, list[Service]]
    clocks: Clocks
    rabbitmq_disk: Disk
    env: Mapping[str, str]  # of every process of the service
    busy: defaultdict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )  # by URL of a process
    met: Counter[str] = field(default_factory=Counter)  # dangerous states that only a fault can see

    @property
    def urls(self) -> list[str]:
        """Return the URLs of the processes that take orders."""
        return [service.url for service in self.roles["api"]]

    @property
    def services(self) -> list[Service]:
        """Return every process of the service."""
        return [service for services in self.roles.values() for service in services]

    def logs(self) -> list[Path]:
        """Return the logs of the service's processes."""
        return [service.log for service in self.services]

    def older_logs(self) -> list[Path]:
        """Return the logs that they wrote as the older release."""
        return sorted((self.directory / "logs").glob(f"{release.VERSION}-*.log"))

    async def is_quiet(self) -> bool:
        """Return whether every order has ended, every event is published, and every message has taken effect."""
        conn = await asyncpg.connect(self.postgres.url)
        try:
            return bool(await conn.fetchval(QUIET))
        finally:
            conn.terminate()

    async def recover(self) -> None:
        """Stop every fault, and start whatever does not run. The faults do so themselves, unless they failed."""
        for link in (self.postgres_link, self.rabbitmq_link):
            link.disarm()
        async with httpx.AsyncClient(base_url=self.sandbox.url, trust_env=False, timeout=RESTART_SECONDS) as sandbox:
            (await sandbox.delete("/faults")).raise_for_status()


def keep_logs(directory: Path, output: Path) -> None:
    """Copy the logs of the processes to `output`, if any process was started."""
    if (logs := directory / "logs").exists():
        shutil.copytree(logs, output / "logs", dirs_exist_ok=True)


@contextlib.asynccontextmanager
async def running(
    directory: Path, processes: Mapping[str, int] = PROCESSES, broker_nodes: int = 1
) -> AsyncIterator[System]:
    """Start everything, and end it with the block. `processes`: of the service, for each role."""
    async with contextlib.AsyncExitStack() as stack:
        clocks.preload()
        times, disk = directory / "clocks", Disk(directory / "disk")
        times.mkdir()
        postgres_clock, partners_clock = Clock(times / "postgres"), Clock(times / "partners")
        database = Pair(directory, postgres_clock.env)
        redis, rabbitmq = installed.Redis(directory), Broker(directory, broker_nodes, disk.env)
        await asyncio.gather(*(stack.enter_async_context(server) for server in (database, redis, rabbitmq)))
        ledger, logs = directory / "ledger.sqlite", directory / "logs"
        logs.mkdir()
        sandbox = Service(
            partners_clock.env_if_preloaded, ("sandbox", "--ledger", str(ledger)), log=logs / "sandbox.log"
        )
        postgres_link = Proxy("127.0.0.1", database.port, frames=postgres)
        rabbitmq_link = Proxy("127.0.0.1", rabbitmq.port, frames=amqp)
        for part in (sandbox, postgres_link, rabbitmq_link):
            await stack.enter_async_context(part)
        code, _, err = await orders("migrate", database_url=database.url)
        if code:
            raise RuntimeError(f"orders migrate ended with {code}: {err}")
        env = {
            **SETTINGS,
            "ORDERS_DATABASE_URL": postgres_link.url(database.url),
            "ORDERS_REDIS_URL": redis.url,
            "ORDERS_RABBITMQ_URL": rabbitmq_link.url(rabbitmq.url()),
            **dict.fromkeys(("ORDERS_INVENTORY_URL", "ORDERS_PAYMENT_URL", "ORDERS_SHIPPING_URL"), sandbox.url),
        }
        names = {role: [f"{role}-{number}" for number in range(count)] for role, count in processes.items()}
        service_clocks = {name: Clock(times / name) for of_role in names.values() for name in of_role}
        roles = {
            role: [
                Service(
                    {**env, **service_clocks[name].env_if_preloaded, "ORDERS_ROLES": role}, log=logs / f"{name}.log"
                )
                for name in of_role
            ]
            for role, of_role in names.items()
        }
        all_clocks = Clocks(postgres_clock, partners_clock, list(service_clocks.values()))
        system = System(
            directory, database, redis, rabbitmq, sandbox, postgres_link, rabbitmq_link, roles, all_clocks, disk, env
        )
        await asyncio.gather(*(stack.enter_async_context(service) for service in system.services))
        yield system

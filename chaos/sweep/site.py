"""What all runs of a sweep share: the servers, the client and its answers, processes, and the judge."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from app import db
from chaos.runner.system import System
from tests.harness.checker import Answers, violations
from tests.harness.forked import Forked
from tests.harness.processes import REPOSITORY, ProcessTree, Service, tail
from tests.harness.wait import wait_until

PATIENCE_SECONDS = 120.0
HOOKS = "chaos.sweep.hooks"
RECOVERING = {"ORDERS_OUTBOX_POLL_SECONDS": "0.1", "ORDERS_SAGA_POLL_SECONDS": "0.1"}
LEASES = {
    "ORDERS_OUTBOX_LEASE_SECONDS": "1.5",
    "ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS": "1",
    "ORDERS_SAGA_LEASE_SECONDS": "1.5",
    "ORDERS_PARTNER_TIMEOUT_SECONDS": "0.5",
    "ORDERS_SAGA_DEADLINE_SECONDS": "300",
}


class NotRecovered(Exception):
    """A command did not do what it had to."""


class Site:
    """The servers of a system, used without proxies and with processes of the sweep's own.

    `pruned`: ids of the orders whose old rows must be gone.
    """

    def __init__(self, system: System, pool: db.Pool, directory: Path) -> None:
        self.system = system
        self.pool = pool
        self.directory = directory
        self.answers = Answers()
        self.pruned: set[str] = set()
        self.broker_url = system.rabbitmq.url()
        self._number = 0
        self._env = {
            **system.env,
            **LEASES,
            "ORDERS_ROLES": "api,relay,consumer,janitor",
            "ORDERS_DATABASE_URL": system.postgres.url,
            "ORDERS_RABBITMQ_URL": self.broker_url,
        }

    def new_key(self) -> str:
        """Return an idempotency key that was never used."""
        self._number += 1
        return f"sweep-{self._number}"

    def service(self, name: str, settings: Mapping[str, str], module: str = "app") -> Service:
        """Return a process of the service with all roles, unless the settings say otherwise."""
        return Service({**self._env, **settings}, log=self._log(name), module=module)

    @contextlib.asynccontextmanager
    async def recovering(self) -> AsyncIterator[Service]:
        """Run a service that finishes whatever waits: the block ends when all is quiet."""
        async with self.service("recovering", RECOVERING) as service:
            yield service
            await self.until_quiet()

    async def run(
        self,
        args: Sequence[str],
        settings: Mapping[str, str],
        module: str = "app",
        until: Callable[[], Awaitable[object]] | None = None,
    ) -> int:
        """Run `orders …` to its end, or to a SIGTERM when `until` is true. Return the exit code."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
        log = self._log(args[0])
        process = Forked(module, args, {**inherited, **self._env, **settings}, REPOSITORY, log, log)

        async def is_over() -> bool:
            return process.poll() is not None or (until is not None and bool(await until()))

        try:
            await wait_until(is_over, PATIENCE_SECONDS, f"end of orders {' '.join(args)}")
            process.send_signal(signal.SIGTERM)
            await wait_until(lambda: process.poll() is not None, PATIENCE_SECONDS, "end after SIGTERM")
        except AssertionError as error:
            error.add_note(tail(log))
            raise
        finally:
            await ProcessTree(process).kill()
        return process.wait()

    async def command(
        self, args: Sequence[str], settings: Mapping[str, str] | None = None, expected: Sequence[int] = (0,)
    ) -> None:
        """Run `orders …`. Raises NotRecovered if its exit code is not expected."""
        code = await self.run(args, settings or {})
        if code not in expected:
            raise NotRecovered(f"orders {' '.join(args)} ended with {code}")

    async def set_faults(self, faults: Sequence[Mapping[str, Any]]) -> None:
        """Give the partners these faults, and no others."""
        async with self.sandbox() as sandbox:
            (await sandbox.put("/faults", json=list(faults))).raise_for_status()

    def sandbox(self) -> httpx.AsyncClient:
        """Return a client of the partners."""
        return httpx.AsyncClient(base_url=self.system.sandbox.url, trust_env=False, timeout=60)

    async def until_quiet(self) -> None:
        """Wait until every order has ended and every event is published."""
        await wait_until(self.system.is_quiet, PATIENCE_SECONDS, "end of every order")

    async def until(self, query: str, *args: object) -> None:
        """Wait until this query returns true."""
        await wait_until(lambda: self.pool.fetchval(query, *args), PATIENCE_SECONDS, query)

    async def violations(self) -> list[str]:
        """Judge tables and ledger."""
        async with self.sandbox() as sandbox:
            return await violations(self.system.postgres.url, sandbox, self.answers, pruned=self.pruned)

    def _log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"


@contextlib.asynccontextmanager
async def open_site(system: System, directory: Path) -> AsyncIterator[Site]:
    """Open a site in a running system."""
    async with db.open_pool(system.postgres.url, 2) as pool:
        yield Site(system, pool, directory)


async def place(service: Service, key: str, body: Mapping[str, Any]) -> httpx.Response:
    """Send an order once. Raises httpx.TransportError if the process dies before it answers."""
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=30) as client:
        return await client.post("/orders", json=body, headers={"Idempotency-Key": key})


async def until_ready(service: Service) -> None:
    """Wait until the service says that it is ready."""
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:

        async def is_ready() -> bool:
            return bool((await client.get("/readyz")).json()["status"] == "ok")

        await wait_until(is_ready, PATIENCE_SECONDS, "readiness")

"""Systems to verify: orders that have ended, in a database and in a partners' ledger, and damage to plant in either."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prometheus_client import CollectorRegistry

from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import queues
from app.bootstrap.verification import find_books, make_config, make_verifier
from app.db import Pool
from app.observability.signals import Signals
from app.operations.maintenance.verifying import RecentVerifier
from app.operations.verify.findings import MAX_SUSPECTS, Invariant
from app.operations.verify.report import InvariantVerdict, VerdictStatus, VerifyReport
from app.operations.verify.run import Scope, Verifier
from app.partners.http import HttpClient
from app.settings import Verification, load
from tests.harness.api import serving
from tests.harness.orders import placed
from tests.harness.sandboxes import in_a_thread, plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

ROLES = "api,relay,consumer,janitor"
LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
FINAL_ORDERS = "SELECT count(*) FROM orders WHERE status IN ('confirmed', 'rejected', 'cancelled')"
AGEING = (
    "UPDATE orders SET placed_at = placed_at - make_interval(secs => $2) WHERE id = $1",
    "UPDATE outbox SET pending_since = pending_since - make_interval(secs => $2) WHERE id = $1",
)
ALL_ORDERS = Scope()
UNPUBLISHED = "SELECT count(*) FROM outbox WHERE published_at IS NULL"


@dataclass
class Verified:
    """A database and a sandbox with a ledger file. `orders`: those placed, by name."""

    database_url: str
    pool: Pool
    sandbox: httpx.AsyncClient
    sandbox_url: str
    ledger: Path
    _stack: contextlib.AsyncExitStack
    orders: dict[str, UUID] = field(default_factory=dict)

    @property
    def partners(self) -> dict[str, str]:
        """The settings that name the partners."""
        return dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), self.sandbox_url)

    async def place(self, *names: str, settings: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Run a service until an order of each of these names has ended, each with a key of its name."""
        values: dict[str, Any] = {"roles": ROLES, **self.partners, **(settings or {})}
        async with serving(self.database_url, **values) as api:
            for name in names:
                body = {"items": [LINE]} | changes
                answer = await api.post("/orders", json=body, headers={"Idempotency-Key": name})
                self.orders[name] = UUID(answer.raise_for_status().json()["id"])
            await wait_until(self._has_ended, AMPLE_SECONDS, "the end of every order")

    async def _has_ended(self) -> bool:
        ended = await self.pool.fetchval(FINAL_ORDERS) == await self.pool.fetchval("SELECT count(*) FROM orders")
        return bool(ended and await self.pool.fetchval(UNPUBLISHED) == 0)

    async def verify(self, scope: Scope = ALL_ORDERS, page_size: int = 500, **settings: Any) -> VerifyReport:
        """Run one pass as `orders verify` does, but without a grace: nothing is in progress."""
        async with self.verifier(page_size, **settings) as verifier:
            return (await verifier.run(scope)).report()

    async def verify_recent(self, recent: RecentVerifier, registry: CollectorRegistry) -> dict[str, tuple[float, bool]]:
        """Run one pass of the janitor; return the violations of each invariant, and whether it was ever checked."""
        await recent.run_once()
        return {
            invariant.value: (
                _sample(registry, "invariant_violations", invariant),
                _sample(registry, "invariant_checked_timestamp_seconds", invariant) > 0,
            )
            for invariant in Invariant
        }

    def janitor(self, signals: Signals, max_again: int = MAX_SUSPECTS, **settings: Any) -> RecentVerifier:
        """Return the janitor's task, for orders of any age."""

        async def make() -> Verifier:
            return await stack.enter_async_context(self.verifier(**settings))

        stack = self._stack
        return RecentVerifier(make, signals, settled_seconds=0, max_again=max_again)

    @contextlib.asynccontextmanager
    async def verifier(self, page_size: int = 500, **settings: Any) -> AsyncIterator[Verifier]:
        """Lend a verifier of this system."""
        values = {"database_url": self.database_url, **self.partners, **settings}
        configured = load(Verification, **values)
        async with contextlib.AsyncExitStack() as stack:
            broker = make_broker(configured.rabbitmq_url.get_secret_value(), self.pool, Signals())
            stack.push_async_callback(broker.close)
            session = await stack.enter_async_context(HttpClient())
            access = await find_books(session, configured, page_size=page_size)
            config = replace(make_config(configured), grace_seconds=0, page_size=page_size)
            yield make_verifier(self.pool, broker, queues(), access, config)

    def write_ledger(self, statement: str, *values: Any) -> None:
        """Change the ledger's file behind the sandbox's back."""
        with contextlib.closing(sqlite3.connect(self.ledger, isolation_level=None, timeout=AMPLE_SECONDS)) as file:
            file.execute(statement, values)

    async def call(self, path: str, key: str, body: Mapping[str, Any]) -> None:
        """Call a partner as the service does, without the service."""
        answer = await self.sandbox.post(path, json=body, headers={"Idempotency-Key": key})
        answer.raise_for_status()

    async def place_silently(self, age_seconds: float = 0, *, published: bool = False) -> UUID:
        """Place an order without a service, as if so long ago; `published`: mark its event so, though never sent."""
        order = await placed(self.pool)
        for statement in AGEING:
            await self.pool.execute(statement, order.id, float(age_seconds))
        if published:
            await self.pool.execute("UPDATE outbox SET published_at = pending_since WHERE id = $1", order.id)
        return order.id


@contextlib.asynccontextmanager
async def system_to_verify(
    database_url: str, pool: Pool, directory: Path, *, hides_ledger: bool = False
) -> AsyncIterator[Verified]:
    """Lend a system without orders. `hides_ledger`: the partners answer only query calls."""
    ledger = directory / "ledger.sqlite"
    with in_a_thread(ledger, hides_ledger=hides_ledger) as url:
        async with plain_http(url) as http, contextlib.AsyncExitStack() as stack:
            yield Verified(database_url, pool, http, url, ledger, stack)


def _sample(registry: CollectorRegistry, name: str, invariant: Invariant) -> float:
    value = registry.get_sample_value(name, {"invariant": invariant.value})
    assert value is not None
    return value


def verdict_on(report: VerifyReport, invariant: str) -> InvariantVerdict:
    """Return the row of one invariant."""
    return next(row for row in report.invariants if row.invariant is Invariant(invariant))


def statuses(report: VerifyReport) -> dict[str, str]:
    """Return the invariants that do not simply hold."""
    rows = report.invariants
    return {row.invariant.value: row.status.value for row in rows if row.status is not VerdictStatus.HOLDS}


def problems(report: VerifyReport) -> Iterator[str]:
    """Return what is wrong, one line each, to be shown by a failing test."""
    for row in report.invariants:
        yield from (f"{row.invariant} {example.subject}: {example.problem}" for example in row.examples)
        if row.detail:
            yield f"{row.invariant} {row.detail}"

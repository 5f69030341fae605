"""Orchestrators on a database and a partner sandbox. A test runs each claim and decides when time passes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx

from app.db import Pool
from app.loops import Backoff
from app.orders import store
from app.orders.facts import OrderFinished
from app.orders.model import Order
from app.partners.ports import ChargeRequest, Outcome, PartnerPorts, Payment
from app.saga.gateway import CircuitConfig, PartnerGateway
from app.saga.orchestrator import Orchestrator
from app.saga.pauses import PartnerPauses
from app.saga.runner import SagaConfig
from app.saga.steps import PLANS, Plans
from tests.harness import sandboxes
from tests.harness.observed import Observed
from tests.harness.orders import TENANT
from tests.harness.sandboxes import Partners

ROUNDS = 40  # far more than any saga needs: one that has not ended by then is stuck
LEASE_SECONDS = 30.0
NEVER = 1_000_000  # failures in a row, so that circuits stay closed unless a test is about them


def dies_at(point: str) -> Callable[[str], None]:
    """Return a function for crash points that stops the runner at `point`."""

    def checkpoint(passed: str) -> None:
        if passed == point:
            raise RuntimeError(f"died at {point}")

    return checkpoint


@contextlib.asynccontextmanager
async def running(orchestrator: Orchestrator) -> AsyncIterator["asyncio.Task[None]"]:
    """Run the orchestrator as the service does, and stop it at the end."""
    task = asyncio.create_task(orchestrator.run())
    try:
        yield task
    finally:
        orchestrator.stop()
        await task


class GatedPayment:
    """The payment partner behind a gate: a charge sets `arrived`, and continues when `gate` is set."""

    def __init__(self, payment: Payment) -> None:
        self._payment = payment
        self.arrived = asyncio.Event()
        self.gate = asyncio.Event()
        self.waiting = 0

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Wait for the gate, then charge."""
        self.waiting += 1
        self.arrived.set()
        await self.gate.wait()
        return await self._payment.charge(charge)

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Refund at once."""
        return await self._payment.refund(charge)


class ScriptedPayment:
    """The payment partner; its first calls return these answers, or raise these errors."""

    def __init__(self, payment: Payment, *answers: Outcome | Exception) -> None:
        self._payment = payment
        self._answers = list(answers)

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Return the next answer, or charge."""
        return self._answer() if self._answers else await self._payment.charge(charge)

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Return the next answer, or refund."""
        return self._answer() if self._answers else await self._payment.refund(charge)

    def _answer(self) -> Outcome:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class Stage:
    """A database, a sandbox, and any number of orchestrators between them."""

    pool: Pool
    http: httpx.AsyncClient
    partners: Partners
    signals: Observed = field(default_factory=Observed)
    finished: list[OrderFinished] = field(default_factory=list)
    gateway: PartnerGateway | None = None  # of the last orchestrator

    def __post_init__(self) -> None:
        self.signals.subscribe(OrderFinished, self.finished.append)

    def orchestrator(
        self,
        owner: str = "one",
        *,
        partners: Partners | None = None,
        payment: Payment | None = None,
        concurrency: int = 10,
        retry_cap_seconds: float = 30,
        circuit_failures: int = NEVER,
        circuit_open_seconds: float = 10,
        clock: Callable[[], float] = time.monotonic,
        needs_operator_seconds: float = 300,
        plans: Plans = PLANS,
        pauses: PartnerPauses | None = None,
        checkpoint: Callable[[str], None] = lambda _: None,
        on_finished: Callable[[UUID], None] | None = None,
    ) -> Orchestrator:
        """Return an orchestrator that retries at once and polls only every hour."""
        asked = partners or self.partners
        self.signals.crash_point = checkpoint
        if on_finished is not None:
            self.signals.subscribe(OrderFinished, lambda fact: on_finished(fact.order_id))
        ports = PartnerPorts(asked.inventory, payment or asked.payment, asked.shipping)
        circuits = CircuitConfig(circuit_failures, circuit_open_seconds)
        gateway = PartnerGateway(ports, circuits, self.signals, plans, clock, pauses)
        self.gateway = gateway
        config = SagaConfig(
            owner=owner,
            concurrency=concurrency,
            poll_seconds=3600,
            lease_seconds=LEASE_SECONDS,
            retry=Backoff(0.001, retry_cap_seconds),
            needs_operator_seconds=needs_operator_seconds,
        )
        return Orchestrator(self.pool, gateway, config, self.signals, plans)

    @property
    def events(self) -> int:
        """Return how many orders were finished."""
        return len(self.finished)

    async def let_time_pass(self) -> None:
        """Let every pause and every lease end."""
        await self.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() WHERE finished_at IS NULL")

    async def let_the_deadline_pass(self, in_seconds: float = 0) -> None:
        """Make every unfinished saga late, or late in so many seconds."""
        query = "UPDATE sagas SET deadline_at = clock_timestamp() + make_interval(secs => $1) WHERE finished_at IS NULL"
        await self.pool.execute(query, in_seconds)

    async def drive(self, orchestrator: Orchestrator | None = None) -> None:
        """Run until every saga has ended."""
        runner = orchestrator or self.orchestrator()
        for _ in range(ROUNDS):
            await self.let_time_pass()
            if not await runner.run_once():
                return
        raise AssertionError(f"a saga has not ended after {ROUNDS} rounds")

    async def order(self, saga_id: UUID) -> Order:
        """Return the order as it is now."""
        return await store.get(self.pool, TENANT, saga_id)

    async def outcome(self, saga_id: UUID) -> str:
        """Return the order's status and reason: `rejected: timed-out`."""
        order = await self.order(saga_id)
        return f"{order.status}: {order.status_reason}" if order.status_reason else order.status

    async def saga(self, saga_id: UUID) -> dict[str, Any]:
        """Return the saga's row; `due`: it can be claimed; `pause_seconds`: from its last write until it is due."""
        query = """
            SELECT *, next_attempt_at <= clock_timestamp() AS due,
                   extract(epoch FROM next_attempt_at - updated_at)::float8 AS pause_seconds
            FROM sagas WHERE id = $1
        """
        return dict(await self.pool.fetchrow(query, saga_id) or {})

    async def log(self, saga_id: UUID) -> list[str]:
        """Return the saga's log: `do charge_payment 2 unknown`."""
        query = "SELECT action, step, attempt, outcome FROM saga_steps WHERE saga_id = $1 ORDER BY id"
        return [" ".join(map(str, row)) for row in await self.pool.fetch(query, saga_id)]

    async def ledger(self, saga_id: UUID) -> list[str]:
        """Return what the partners decided, in order: `payment.charge done`."""
        return [f"{each['operation']} {each['outcome']}" for each in await sandboxes.entries(self.http, saga_id)]

    async def standing(self, saga_id: UUID) -> dict[str, Any]:
        """Return the partners' totals for the saga: money kept, stock held or sold, parcels sent."""
        told = await sandboxes.summary(self.http, saga_id)
        state = {name: told[name] for name in ("held", "committed", "shipped")}
        return {"kept_minor": told["charged_minor"] - told["refunded_minor"], **state}

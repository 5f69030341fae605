"""The orchestrator claims due sagas and runs up to `concurrency` of them at a time. See `runner` for one saga."""

import asyncio
from datetime import datetime

from app import db
from app.claim_hint import START, ClaimHint
from app.loops import Loop
from app.observability.facts import LoopSucceeded
from app.observability.signals import Signals
from app.orders import store as order_store
from app.orders.model import Order
from app.saga import store
from app.saga.gateway import PartnerGateway
from app.saga.runner import Runner, SagaConfig
from app.saga.steps import PLANS, Plans
from app.saga.store import Saga


class Orchestrator:
    """Runs sagas of these plans. Any number of orchestrators may run at the same time."""

    def __init__(
        self, pool: db.Pool, partners: PartnerGateway, config: SagaConfig, signals: Signals, plans: Plans = PLANS
    ) -> None:
        self._pool = pool
        self._partners = partners
        self._config = config
        self._plans = plans
        self._runner = Runner(pool, partners, config, signals, plans)
        self._loop = Loop(
            "orchestrator", self._dispatch, config.poll_seconds, lambda: signals.emit(LoopSucceeded("orchestrator"))
        )
        self._hint = ClaimHint()
        self._running: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Look for due sagas now: one has just been started, or its pause has ended."""
        self._loop.wake()

    async def run(self) -> None:
        """Run sagas until `stop`; then wait until each running saga has finished its call and is released."""
        await self._loop.run()
        if self._running:
            await asyncio.wait(self._running)

    def stop(self) -> None:
        """Start no more calls."""
        self._runner.stop()
        self._loop.stop()

    async def run_once(self) -> int:
        """Claim due sagas and run each until it has ended or must wait. Return how many were claimed."""
        claimed = await self._claim(self._config.concurrency)
        await asyncio.gather(*(self._run(saga, order) for saga, order in claimed))
        return len(claimed)

    async def _dispatch(self) -> int:
        """Start what is due, up to `concurrency`. Return 0 if nothing more is due, or no slot is free.

        Nothing starts before this process knows which partners are paused.
        """
        if not self._partners.pauses.known:
            return 0
        free = self._config.concurrency - len(self._running)
        claimed = await self._claim(free, self._hint.since()) if free > 0 else []
        for saga, order in claimed:
            task = asyncio.create_task(self._run(saga, order))
            self._running.add(task)
            task.add_done_callback(self._discard)
        return (
            len(claimed) if len(claimed) == free else 0
        )  # a claim that got less than it asked for saw all that is due

    def _discard(self, task: asyncio.Task[None]) -> None:
        if len(self._running) >= self._config.concurrency:
            self._loop.wake()  # every slot was taken, so more sagas may be due
        self._running.discard(task)

    async def _claim(self, limit: int, since: datetime = START) -> list[tuple[Saga, Order]]:
        """Claim due sagas, and load their orders: after the claim, so that they show every cancel before it.

        If loading fails, the sagas are claimed again when their leases expire.
        """
        async with db.connection(self._pool) as conn:
            sagas = await store.claim(conn, self._config.owner, self._plans, limit, self._config.lease_seconds, since)
            self._hint.record(saga.due_at for saga in sagas)
            orders = await order_store.load_many(conn, [saga.id for saga in sagas]) if sagas else {}
        return [(saga, orders[saga.id]) for saga in sagas]

    async def _run(self, saga: Saga, order: Order) -> None:
        due_in_seconds = await self._runner.run(saga, order)
        if due_in_seconds is not None:
            self._loop.wake_in(due_in_seconds)

"""The orchestrator: takes due sagas on, calls partners, records what they say, until each saga has ended.

    claim (lease) → record *attempted* → call (no transaction) → record the outcome → …

An outcome and the next attempt are recorded together, so a step costs one statement and one call. A change of the
order's status, the event that tells of it and the saga's row commit in one transaction.

Where it may die, and who recovers:

- before an attempt is recorded: nothing was asked of anyone;
- attempt recorded, call made or not, outcome not recorded: the lease ends, any process claims the saga and makes the
  same call again with the same idempotency key; the partner answers as before;
- outcome recorded: the next process goes on from there;
- frozen past its lease and awake again: its version is old, its write changes nothing (StaleLease), and what it asked
  of the partner meanwhile is what the new runner asked too.

An unclear answer is never guessed at: forward it is asked again until the deadline, then the saga turns back; backward
it is asked again without end. Waiting is `next_attempt_at`, never a sleeping task.

A cancel (see `saga.cancellation`) is on the order's row. Every record brings news of it, and then nothing further is
asked for but undoing; the record that would confirm the order, or would leave the saga to wait, locks the order first.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import structlog

from app import db
from app.errors import DatabaseUnavailable, StaleLease
from app.loops import Loop, full_jitter
from app.orders import service
from app.orders.models import Order
from app.orders.status import Reason, Status
from app.partners.ports import Done, Inventory, Item, NotSent, Outcome, Payment, Refused, Shipping, Unknown
from app.saga import plan, store
from app.saga.plan import Action, Call, Step
from app.telemetry import Metrics, trace_context

log = structlog.get_logger(__name__)

POOL_WAIT_SECONDS = 5.0  # nobody waits for an answer here, so rather wait than leave the saga to its lease


class Orchestrator:
    """Drives up to `concurrency` sagas at a time. Any number of orchestrators may run."""

    def __init__(
        self,
        pool: db.Pool,
        inventory: Inventory,
        payment: Payment,
        shipping: Shipping,
        metrics: Metrics,
        *,
        owner: str,
        concurrency: int,
        poll_seconds: float,
        lease_seconds: float,
        retry_base_seconds: float,
        retry_cap_seconds: float,
        on_event: Callable[[], None],
        checkpoint: Callable[[str], None],
        on_finished: Callable[[UUID], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._inventory = inventory
        self._payment = payment
        self._shipping = shipping
        self._metrics = metrics
        self._owner = owner
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._retry = (retry_base_seconds, retry_cap_seconds)
        self._on_event = on_event
        self._checkpoint = checkpoint
        self._on_finished = on_finished
        self._loop = Loop("orchestrator", self._dispatch, poll_seconds)
        self._driving: set[asyncio.Task[None]] = set()
        self._stopping = False

    def wake(self) -> None:
        """A saga has just been started, or cut short in a pause: look at once."""
        self._loop.wake()

    async def run(self) -> None:
        """Drive sagas until `stop`; those under way finish their present call and are given back."""
        await self._loop.run()
        if self._driving:
            await asyncio.wait(self._driving)

    def stop(self) -> None:
        """Begin no more calls."""
        self._stopping = True
        self._loop.stop()

    async def run_once(self) -> int:
        """Claim what is due and drive each saga until it has ended or must wait. Returns how many were claimed."""
        claimed = await self._claim()
        await asyncio.gather(*(self._drive(saga) for saga in claimed))
        return len(claimed)

    async def _dispatch(self) -> int:
        claimed = await self._claim() if len(self._driving) < self._concurrency else []
        for saga in claimed:
            task = asyncio.create_task(self._drive(saga))
            self._driving.add(task)
            task.add_done_callback(self._done)
        return len(claimed)

    def _done(self, task: asyncio.Task[None]) -> None:
        if len(self._driving) >= self._concurrency:
            self._loop.wake()  # it was full: something may have been waiting for this place
        self._driving.discard(task)

    async def _claim(self) -> list[store.Saga]:
        async with db.connection(self._pool, POOL_WAIT_SECONDS) as conn:
            limit = self._concurrency - len(self._driving)
            return await store.claim(conn, self._owner, plan.PLANS, limit, self._lease_seconds)

    async def _drive(self, saga: store.Saga) -> None:
        with trace_context(saga.trace), structlog.contextvars.bound_contextvars(order_id=str(saga.id)):
            try:
                await self._run(saga)
            except StaleLease:
                log.info("saga.lease_lost")
            except DatabaseUnavailable as error:
                log.warning("saga.interrupted", error=str(error), resumes="when the lease ends")
            except Exception:
                log.exception("saga.failed", resumes="when the lease ends")

    async def _run(self, saga: store.Saga) -> None:
        deadline = time.monotonic() + saga.remaining_seconds
        async with db.connection(self._pool, POOL_WAIT_SECONDS) as conn:
            order = await service.load(conn, saga.id)
        if order is None:
            raise AssertionError(f"bug: saga {saga.id} has no order")
        saga = replace(saga, cancelled=order.cancel_requested_at is not None)
        state, entries, pause = saga.state, list[store.Entry](), None
        while True:
            late = time.monotonic() >= deadline
            ours = await self._record(saga, state, entries, late=late, pause_seconds=pause)
            if ours is None:
                return
            saga, state, entries = ours, ours.state, []
            if saga.must_turn:
                continue  # the partner has not been asked yet, and need not be
            call = plan.decide(state)
            assert isinstance(call, Call)  # noqa: S101 - bug: what has ended is not ours any more
            self._checkpoint(f"saga.{call.step}.{call.action}.attempted")
            outcome = await self._call(call, order, state.attempts)
            self._checkpoint(f"saga.{call.step}.{call.action}.answered")
            entries = [_entry(call, state.attempts, outcome)]
            following = plan.advance(state, outcome)
            pause = self._pause(state.attempts, outcome) if following == state else None
            state = following

    async def _record(
        self,
        saga: store.Saga,
        reached: plan.State,
        entries: Sequence[store.Entry],
        *,
        late: bool,
        pause_seconds: float | None,
    ) -> store.Saga | None:
        """Write what was reached, and the attempt that follows; None when the saga has ended or was given back.

        Only the step from one call to the next does without the order. Whatever changes its status, or leaves the saga
        to wait, locks it first, and then knows for certain whether it was cancelled. Raises StaleLease.
        """
        state = plan.heed(reached, cancelled=saga.cancelled, late=late)
        if state.direction is saga.state.direction and self._goes_on(state, pause_seconds):
            async with db.connection(self._pool, POOL_WAIT_SECONDS) as conn:
                return await self._attempt(conn, saga, state, entries)
        async with db.transaction(self._pool, POOL_WAIT_SECONDS) as conn:
            order = await service.load(conn, saga.id, lock=True)
            assert order is not None  # noqa: S101 - bug: the saga's foreign key says there is one
            state = plan.heed(reached, cancelled=order.cancel_requested_at is not None, late=late)
            turned = state.direction is not saga.state.direction
            pause_seconds = None if turned else pause_seconds  # turning back need not wait
            if goes_on := self._goes_on(state, pause_seconds):
                ours = await self._attempt(conn, saga, state, entries)
            else:
                ours = await store.save(conn, saga, state, entries, due_in_seconds=pause_seconds or 0, owner=None)
            if turned:
                order = await service.change_status(conn, order, Status.COMPENSATING, state.reason, saga.trace)
            if isinstance(end := plan.decide(state), plan.Finish):
                tracking_id = _tracking_id(entries)
                order = await service.change_status(conn, order, end.status, state.reason, saga.trace, tracking_id)
        if isinstance(end, plan.Finish):
            self._finished(saga, order)
        if pause_seconds is not None:
            self._loop.wake_in(pause_seconds)
        return ours if goes_on else None

    def _goes_on(self, state: plan.State, pause_seconds: float | None) -> bool:
        return isinstance(plan.decide(state), Call) and pause_seconds is None and not self._stopping

    async def _attempt(
        self, conn: db.Connection, saga: store.Saga, state: plan.State, entries: Sequence[store.Entry]
    ) -> store.Saga:
        """Write the state and, before it is made, the attempt of its call; the lease is renewed."""
        call = plan.decide(state)
        assert isinstance(call, Call)  # noqa: S101 - bug: the callers looked
        state = plan.attempted(state)
        entries = [*entries, store.Entry(call.step, call.action, state.attempts, "attempted")]
        return await store.save(conn, saga, state, entries, due_in_seconds=self._lease_seconds, owner=self._owner)

    def _finished(self, saga: store.Saga, order: Order) -> None:
        self._checkpoint("saga.finished")
        self._on_event()
        self._on_finished(saga.id)
        self._metrics.orders_finished.labels(order.status, order.status_reason or "").inc()
        self._metrics.saga_duration.observe(max(0.0, (datetime.now(UTC) - saga.started_at).total_seconds()))
        log.info("saga.finished", status=order.status, reason=order.status_reason)

    async def _call(self, call: Call, order: Order, attempt: int) -> Outcome:
        began = time.perf_counter()
        outcome = await self._ask(call, order)
        label = _label(outcome)
        self._metrics.saga_step_duration.labels(call.step, call.action, label).observe(time.perf_counter() - began)
        if not isinstance(outcome, Done):
            if outcome == Refused(Reason.HOLD_EXPIRED):
                self._metrics.inventory_holds_expired.inc()
            if call.action is Action.UNDO:
                self._metrics.compensation_failed.labels(call.step).inc()
            wrong = isinstance(outcome, Unknown) and outcome.our_fault
            (log.error if wrong else log.info)(
                "saga.step",
                step=call.step,
                action=call.action,
                attempt=attempt,
                outcome=label,
                detail=_detail(outcome),
            )
        return outcome

    async def _ask(self, call: Call, order: Order) -> Outcome:
        items = [Item(line.sku, line.quantity) for line in order.lines]
        match call.step, call.action:
            case Step.RESERVE_INVENTORY, Action.DO:
                return await self._inventory.hold(order.id, items)
            case Step.CHARGE_PAYMENT, Action.DO:
                return await self._payment.charge(order.id, order.total_minor, order.currency, order.payment_method)
            case Step.COMMIT_INVENTORY, Action.DO:
                return await self._inventory.commit(order.id)
            case Step.CREATE_SHIPMENT, Action.DO:
                return await self._shipping.create(order.id, items, order.shipping_address)
            case Step.CREATE_SHIPMENT, Action.UNDO:
                return await self._shipping.cancel(order.id)
            case Step.CHARGE_PAYMENT, Action.UNDO:
                return await self._payment.refund(order.id)
            case Step.RESERVE_INVENTORY, Action.UNDO:
                return await self._inventory.release(order.id)
        raise AssertionError(f"bug: nobody to ask for {call}")

    def _pause(self, attempts: int, outcome: Outcome) -> float:
        wished = outcome.retry_after_seconds if isinstance(outcome, Unknown) else None
        return max(full_jitter(attempts, *self._retry), min(wished or 0.0, self._retry[1]))


def _label(outcome: Outcome) -> str:
    match outcome:
        case Done():
            return "done"
        case Refused():
            return "refused"
        case NotSent():
            return "not-sent"
        case Unknown():
            return "unknown"


def _detail(outcome: Outcome) -> str | None:
    match outcome:
        case Done():
            return None
        case Refused(code=code):
            return code
        case NotSent(detail=detail) | Unknown(detail=detail):
            return detail


def _entry(call: Call, attempt: int, outcome: Outcome) -> store.Entry:
    reply = outcome.reply if isinstance(outcome, Done) else None
    return store.Entry(call.step, call.action, attempt, _label(outcome), _detail(outcome), reply)


def _tracking_id(entries: Sequence[store.Entry]) -> str | None:
    return next(
        (entry.reply["tracking_id"] for entry in entries if entry.reply and "tracking_id" in entry.reply),
        None,
    )

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
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

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
        self._loop = Loop("orchestrator", self._dispatch, poll_seconds)
        self._driving: set[asyncio.Task[None]] = set()
        self._stopping = False

    def wake(self) -> None:
        """A saga has just been started: look at once."""
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
        entries: list[store.Entry] = []
        state = _in_time(saga.state, deadline)
        while True:
            call = plan.decide(state)
            if self._stopping or isinstance(call, plan.Finish):
                await self._record(saga, state, entries, due_in_seconds=0)
                return
            state = plan.attempted(state)
            entries.append(store.Entry(call.step, call.action, state.attempts, "attempted"))
            saga = await self._record(saga, state, entries, due_in_seconds=self._lease_seconds, owner=self._owner)
            self._checkpoint(f"saga.{call.step}.{call.action}.attempted")
            outcome = await self._call(call, order, state.attempts)
            self._checkpoint(f"saga.{call.step}.{call.action}.answered")
            entries = [_entry(call, state.attempts, outcome)]
            following = _in_time(plan.advance(state, outcome), deadline)
            if following == state:
                pause = self._pause(state.attempts, outcome)
                await self._record(saga, state, entries, due_in_seconds=pause)
                self._loop.wake_in(pause)
                return
            state = following

    async def _record(
        self,
        saga: store.Saga,
        state: plan.State,
        entries: Sequence[store.Entry],
        *,
        due_in_seconds: float,
        owner: str | None = None,
    ) -> store.Saga:
        """Write the saga, and the order with it when its status changes. Raises StaleLease."""
        turned = state.direction is not saga.state.direction
        decision = plan.decide(state)
        if not turned and isinstance(decision, Call):
            async with db.connection(self._pool, POOL_WAIT_SECONDS) as conn:
                version = await store.save(conn, saga, state, entries, due_in_seconds=due_in_seconds, owner=owner)
            return replace(saga, version=version, state=state)
        async with db.transaction(self._pool, POOL_WAIT_SECONDS) as conn:
            order = await service.load(conn, saga.id, lock=True)
            assert order is not None  # noqa: S101 - bug: the saga's foreign key says there is one
            version = await store.save(conn, saga, state, entries, due_in_seconds=due_in_seconds, owner=owner)
            if turned:
                order = await service.change_status(conn, order, Status.COMPENSATING, state.reason, saga.trace)
            if isinstance(decision, plan.Finish):
                order = await service.change_status(
                    conn, order, decision.status, state.reason, saga.trace, tracking_id=_tracking_id(entries)
                )
        if isinstance(decision, plan.Finish):
            self._finished(saga, order)
        return replace(saga, version=version, state=state)

    def _finished(self, saga: store.Saga, order: Order) -> None:
        self._checkpoint("saga.finished")
        self._on_event()
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


def _in_time(state: plan.State, deadline: float) -> plan.State:
    return plan.turn_back(state, Reason.TIMED_OUT) if time.monotonic() >= deadline else state


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

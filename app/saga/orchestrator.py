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
it is asked again without end. Waiting is `next_attempt_at`, never a sleeping task. While a partner is left alone (see
`partners.circuit`) its sagas wait in the same way, with no attempt recorded and none spent; the deadline still turns
them back. An undo that fails for long, or a call that no retry mends, needs an operator: it is said, and tried on.

A cancel (see `saga.cancel`) is on the order's row. Every record brings news of it, and then nothing further is
asked for but undoing; the record that would confirm the order, or would leave the saga to wait, locks the order first.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from app import db
from app.errors import DatabaseUnavailable, StaleLease
from app.loops import Backoff, Loop
from app.observability.signals import Signals
from app.observability.traces import trace_context
from app.orders import store as order_store
from app.orders.facts import OrderFinished
from app.orders.model import Order, Status
from app.partners.circuit import Permit
from app.partners.ports import Done, Outcome, Unknown
from app.saga import gateway, plan, store
from app.saga.facts import SagaFinished
from app.saga.gateway import PartnerGateway
from app.saga.plan import Call, SagaDirection
from app.saga.steps import PLANS, Action, Plans, StepRequest

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Turn:
    """One saga's turn with this process. `deadline`: on `time.monotonic`. `permit`: for its next call."""

    deadline: float
    permit: Permit | None = None

    def release(self) -> None:
        """Give up the permit, if there is one."""
        if self.permit is not None:
            self.permit.release()
            self.permit = None

    @property
    def remaining_seconds(self) -> float:
        """Until the saga must turn back if it still goes forward; never negative."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.remaining_seconds == 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """The saga has to wait before its present call; `alarming`: because of an answer that no retry mends."""

    seconds: float
    alarming: bool = False


@dataclass(frozen=True, slots=True)
class SagaConfig:
    """`owner`: the name of this process in leases. `concurrency`: sagas that run at a time.

    `needs_operator_seconds`: for how long an undo may fail before the saga is flagged for an operator.
    """

    owner: str
    concurrency: int
    poll_seconds: float
    lease_seconds: float
    retry: Backoff
    needs_operator_seconds: float


class Orchestrator:
    """Drives up to `concurrency` sagas at a time. Any number of orchestrators may run."""

    def __init__(
        self,
        pool: db.Pool,
        partners: PartnerGateway,
        config: SagaConfig,
        signals: Signals,
        plans: Plans = PLANS,
    ) -> None:
        self._pool = pool
        self._plans = plans
        self._partners = partners
        self._config = config
        self._signals = signals
        self._loop = Loop("orchestrator", self._dispatch, config.poll_seconds)
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
        claimed = await self._claim() if len(self._driving) < self._config.concurrency else []
        for saga in claimed:
            task = asyncio.create_task(self._drive(saga))
            self._driving.add(task)
            task.add_done_callback(self._done)
        return len(claimed)

    def _done(self, task: asyncio.Task[None]) -> None:
        if len(self._driving) >= self._config.concurrency:
            self._loop.wake()  # it was full: something may have been waiting for this place
        self._driving.discard(task)

    async def _claim(self) -> list[store.Saga]:
        async with db.connection(self._pool) as conn:
            limit = self._config.concurrency - len(self._driving)
            return await store.claim(conn, self._config.owner, self._plans, limit, self._config.lease_seconds)

    async def _drive(self, saga: store.Saga) -> None:
        turn = Turn(time.monotonic() + saga.remaining_seconds)
        with trace_context(saga.trace), structlog.contextvars.bound_contextvars(order_id=str(saga.id)):
            try:
                await self._run(turn, saga)
            except StaleLease:
                log.info("saga.lease_lost")
            except DatabaseUnavailable as error:
                log.warning("saga.interrupted", error=str(error), resumes="when the lease ends")
            except Exception:
                log.exception("saga.failed", resumes="when the lease ends")
            finally:
                turn.release()

    async def _run(self, turn: Turn, saga: store.Saga) -> None:
        async with db.connection(self._pool) as conn:
            order = await order_store.load(conn, saga.id)
        if order is None:
            raise AssertionError(f"bug: saga {saga.id} has no order")
        saga = replace(saga, cancelled=order.cancel_reason)
        state, entries, wait = saga.state, list[store.StepLogEntry](), None
        while True:
            ours = await self._record(turn, saga, state, entries, wait)
            if ours is None:
                return
            saga, state, entries, wait = ours, ours.state, [], None
            if saga.must_compensate:
                turn.release()
                continue  # the partner has not been asked yet, and need not be
            call = plan.decide(state)
            assert isinstance(call, Call)  # noqa: S101 - bug: what has ended is not ours any more
            assert turn.permit is not None  # noqa: S101 - bug: an attempt is recorded with a permit
            self._signals.crash_point(f"saga.{call.step}.{call.action}.attempted")
            request = StepRequest(order, saga.started_at, saga.hold_seconds, saga.do_reply)
            outcome = await self._partners.call(state, turn.permit, request)
            self._signals.crash_point(f"saga.{call.step}.{call.action}.answered")
            entries = [_entry(call, state.attempts, outcome)]
            following = plan.advance(state, outcome, self._plans)
            wait = self._wait(state.attempts, outcome) if following == state else None
            state = following

    async def _record(
        self,
        turn: Turn,
        saga: store.Saga,
        reached: plan.SagaState,
        entries: Sequence[store.StepLogEntry],
        wait: Wait | None,
    ) -> store.Saga | None:
        """Write what was reached, and the attempt that follows; None when the saga has ended or was given back.

        Only the step from one call to the next does without the order. Whatever changes its status, or leaves the saga
        to wait, locks it first, and then knows for certain whether it was cancelled. Raises StaleLease.
        """
        state = plan.interrupt(reached, cancelled=saga.cancelled, late=turn.late, plans=self._plans)
        pause = self._pause(turn, saga, state, wait)
        if state.direction is saga.state.direction and self._goes_on(state, pause):
            async with db.connection(self._pool) as conn:
                ours = await self._attempt(conn, saga, state, entries)
            _tell_operator(saga, ours)
            return ours
        async with db.transaction(self._pool) as conn:
            order = await order_store.load(conn, saga.id, lock=True)
            assert order is not None  # noqa: S101 - bug: the saga's foreign key says there is one
            known = plan.interrupt(reached, cancelled=order.cancel_reason, late=turn.late, plans=self._plans)
            if known != state:
                state, pause = known, self._pause(turn, saga, known, wait)
            if goes_on := self._goes_on(state, pause):
                ours = await self._attempt(conn, saga, state, entries)
            else:
                ours = await self._give_back(conn, saga, state, entries, pause)
            if state.direction is not saga.state.direction:
                order = await order_store.change_status(conn, order, Status.COMPENSATING, state.reason, saga.trace)
            if isinstance(end := plan.decide(state), plan.Finish):
                tracking_id = _tracking_id(entries)
                order = await order_store.change_status(conn, order, end.status, state.reason, saga.trace, tracking_id)
        if isinstance(end, plan.Finish):
            self._finished(ours, order)
        _tell_operator(saga, ours)
        if pause is not None:
            self._loop.wake_in(pause.seconds)
        return ours if goes_on else None

    def _pause(self, turn: Turn, saga: store.Saga, state: plan.SagaState, wait: Wait | None) -> Wait | None:
        """Return the wait after the last answer, or the one that the circuit of the next call wants; else get a permit.

        Turning back need not wait for what was asked before. Forward, no pause is longer than the time to the deadline.
        """
        turn.release()  # of the last call, or of one that is not made, now that more is known
        pause = wait if state.direction is saga.state.direction else None
        call = plan.decide(state)
        if pause is None and isinstance(call, Call) and not self._stopping:
            admitted = self._partners.admit(state)
            if isinstance(admitted, Permit):
                turn.permit = admitted
            else:
                pause = Wait(admitted)
        if pause is None or state.direction is SagaDirection.BACKWARD:
            return pause
        return replace(pause, seconds=min(pause.seconds, turn.remaining_seconds))

    def _goes_on(self, state: plan.SagaState, pause: Wait | None) -> bool:
        return isinstance(plan.decide(state), Call) and pause is None and not self._stopping

    async def _attempt(
        self, conn: db.Connection, saga: store.Saga, state: plan.SagaState, entries: Sequence[store.StepLogEntry]
    ) -> store.Saga:
        """Write the state and, before it is made, the attempt of its call; the lease is renewed."""
        call = plan.decide(state)
        assert isinstance(call, Call)  # noqa: S101 - bug: the callers looked
        state = plan.attempted(state)
        entries = [*entries, store.StepLogEntry(call.step, call.action, state.attempts, "attempted")]
        ours = await store.save(
            conn, saga, state, entries, due_in_seconds=self._config.lease_seconds, owner=self._config.owner
        )
        if call.action is Action.UNDO and plan.spec_of(state, self._plans).undo_reads_reply:
            # Read after the write, which may have been the one that recorded the reply.
            return replace(ours, do_reply=await store.do_reply(conn, saga.id, call.step))
        return ours

    async def _give_back(
        self,
        conn: db.Connection,
        saga: store.Saga,
        state: plan.SagaState,
        entries: Sequence[store.StepLogEntry],
        pause: Wait | None,
    ) -> store.Saga:
        """Write the state and leave the saga to whoever comes when it is due.

        An undo has `needs_operator_seconds` from the first time that it has to wait; what no retry mends has none.
        """
        patience = None
        if pause is not None and (pause.alarming or state.direction is SagaDirection.BACKWARD):
            patience = 0.0 if pause.alarming else self._config.needs_operator_seconds
        seconds = 0.0 if pause is None else pause.seconds
        return await store.save(
            conn, saga, state, entries, due_in_seconds=seconds, owner=None, operator_in_seconds=patience
        )

    def _wait(self, attempts: int, outcome: Outcome) -> Wait:
        """Full jitter, on top of what the partner wished for: those whom it told the same do not come together."""
        jitter = self._config.retry.pause(attempts)
        if isinstance(outcome, Unknown):
            return Wait((outcome.retry_after_seconds or 0.0) + jitter, outcome.alarming)
        return Wait(jitter)

    def _finished(self, saga: store.Saga, order: Order) -> None:
        self._signals.crash_point("saga.finished")
        self._signals.emit(OrderFinished(order.id, order.status, order.status_reason))
        self._signals.emit(SagaFinished(order.status, order.status_reason, max(0.0, saga.age_seconds)))


def _tell_operator(before: store.Saga, saga: store.Saga) -> None:
    """Say it once: with the first write that finds it so."""
    if saga.needs_operator and not before.needs_operator:
        state = saga.state
        log.error("saga.needs_operator", step=state.step, direction=state.direction, attempts=state.attempts)


def _entry(call: Call, attempt: int, outcome: Outcome) -> store.StepLogEntry:
    reply = outcome.reply if isinstance(outcome, Done) else None
    return store.StepLogEntry(call.step, call.action, attempt, gateway.label(outcome), gateway.detail(outcome), reply)


def _tracking_id(entries: Sequence[store.StepLogEntry]) -> str | None:
    return next(
        (entry.reply["tracking_id"] for entry in entries if entry.reply and "tracking_id" in entry.reply),
        None,
    )

"""The runner runs one saga from its claim until it has ended or must wait.

    claim and load the order → record *attempted* → call the partner (outside any transaction) → record the outcome → …

An outcome and the next attempt are recorded together, so a step costs one statement and one call. A change of the
order's status, its event and the saga's row commit in one transaction.

Where the process may die, and who recovers:

- before an attempt is recorded: no partner was called;
- after the attempt is recorded, whether or not the call was made: the lease expires, any process claims the saga and
  makes the same call with the same idempotency key, and the partner answers as before;
- after the outcome is recorded: the next process continues from there;
- frozen past its lease and resumed: the saga's version has changed, so the write changes nothing (StaleLease). Its last
  call was the same as the new runner's, with the same idempotency key.

An unclear answer is never guessed at. Forward, the call is retried until the deadline, then the saga compensates;
backward, it is retried until it succeeds. A saga waits in `next_attempt_at`, never in a sleeping task. While a circuit
(see `partners.circuit`) pauses a partner, its sagas wait in the same way, without recording an attempt; the deadline
still applies. The same holds while an operator pauses a partner (see `saga.pauses`). If an undo keeps failing, or
retrying cannot fix the error, the saga is flagged for an operator. Retries continue.

A cancel (see `saga.cancel`) is stored in the order's row. Every write of a saga returns whether its order was
cancelled, and from then on the runner only undoes. A write that would confirm the order, or leave the saga to wait,
locks the order first.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode
from opentelemetry.trace import Status as SpanStatus

from app import db
from app.errors import StaleLease, Unavailable
from app.loops import Backoff
from app.observability import log_fields
from app.observability.signals import Signals
from app.observability.traces import sampled_headers, trace_context, trace_headers
from app.orders import store as order_store
from app.orders.facts import OrderFinished
from app.orders.model import Order, Reason, Status
from app.orders.store import TracedOrder
from app.partners.circuit import Permit
from app.partners.ports import Done, Outcome, Unknown
from app.saga import gateway, plan, store
from app.saga.facts import SagaFinished, SagaWentWrong
from app.saga.gateway import PartnerGateway
from app.saga.plan import Call, Finish, SagaDirection, SagaState
from app.saga.recorder import Change, Recorder
from app.saga.steps import PLANS, Action, Plans, StepRequest
from app.saga.store import Saga, SagaWrite, StepLogEntry
from app.values import immutable

log = structlog.get_logger(__name__)


@immutable
class Wait:
    """The saga must wait before its current call. `alarming`: because of an answer that retrying cannot fix.

    `paused`: because an operator paused the partner.
    """

    seconds: float
    alarming: bool = False
    paused: bool = False


@immutable
class Progress:
    """What has happened to a saga since its last write: its new state, log entries, and a wait before a retry."""

    state: SagaState
    entries: Sequence[StepLogEntry] = ()
    wait: Wait | None = None


@dataclass(slots=True)
class Run:
    """One saga in this process. `deadline`: on `time.monotonic`. `permit`: for its next call.

    `due_in_seconds`: when the saga is due again, once it waits.
    """

    saga: Saga
    deadline: float
    permit: Permit | None = None
    due_in_seconds: float | None = None

    @property
    def remaining_seconds(self) -> float:
        """Return the time until a forward saga must compensate; never negative."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return self.remaining_seconds == 0.0

    def release_permit(self) -> None:
        """Release the permit, if there is one."""
        if self.permit is not None:
            self.permit.release()
            self.permit = None


@immutable
class SagaConfig:
    """`owner`: the name of this process in leases. `concurrency`: how many sagas run at a time.

    `needs_operator_seconds`: how long an undo may fail before the saga is flagged for an operator.
    """

    owner: str
    concurrency: int
    poll_seconds: float
    lease_seconds: float
    retry: Backoff
    needs_operator_seconds: float


class Runner:
    """Runs claimed sagas, any number at a time."""

    def __init__(
        self, pool: db.Pool, partners: PartnerGateway, config: SagaConfig, signals: Signals, plans: Plans = PLANS
    ) -> None:
        self._pool = pool
        self._recorder = Recorder(pool)
        self._partners = partners
        self._config = config
        self._signals = signals
        self._plans = plans
        self._stopping = False

    def stop(self) -> None:
        """Start no more calls: each saga finishes its current call and is released."""
        self._stopping = True

    async def run(self, saga: Saga, order: Order) -> float | None:
        """Run the saga of this order until it has ended or must wait. Return in how many seconds it is due again.

        Only a cancellation raises. After any other error the saga is claimed again when its lease expires.
        """
        run = Run(saga, time.monotonic() + saga.remaining_seconds)
        with (
            trace_context(saga.trace),
            log_fields.bound(order_id=str(saga.id)),
            self._signals.span("saga", attributes={"orders.order_id": str(saga.id)}) as span,
        ):
            try:
                await self._run(run, order)
            except StaleLease:
                log.info("saga.lease_lost")
            except Unavailable as error:
                log.warning("saga.interrupted", error=str(error), resumes="when the lease ends")
            except Exception:
                log.exception("saga.failed", resumes="when the lease ends")
            finally:
                run.release_permit()
                _describe_run(span, run.saga.state)
        return run.due_in_seconds

    async def _run(self, run: Run, order: Order) -> None:
        run.saga = replace(run.saga, cancelled=order.cancel_reason)
        trace.get_current_span().set_attribute("orders.tenant", order.tenant)
        with log_fields.bound(tenant=order.tenant):
            await self._step(run, order)

    async def _step(self, run: Run, order: Order) -> None:
        progress = Progress(run.saga.state)
        while await self._record(run, progress):
            state = run.saga.state
            if run.saga.must_compensate:
                progress = Progress(state)  # the attempt was recorded, but its call is no longer needed
                continue
            progress = await self._call(run, order)

    async def _call(self, run: Run, order: Order) -> Progress:
        """Make the call whose attempt has been recorded, and return what it changes."""
        saga, state, call = run.saga, run.saga.state, plan.decide(run.saga.state)
        assert isinstance(call, Call)  # noqa: S101 - bug: a saga that has ended is not run
        assert run.permit is not None  # noqa: S101 - bug: an attempt is recorded with a permit
        self._signals.crash_point(f"saga.{call.step}.{call.action}.attempted")
        request = StepRequest(order, saga.started_at, saga.hold_seconds, await self._do_reply(saga, call))
        started = time.monotonic()
        outcome = await self._partners.call(state, run.permit, request)
        self._signals.crash_point(f"saga.{call.step}.{call.action}.answered")
        new_state = plan.advance(state, outcome, self._plans)
        wait = self._wait(state.attempts, outcome) if new_state == state else None
        return Progress(new_state, [_log_entry(call, state.attempts, outcome, started)], wait)

    async def _do_reply(self, saga: Saga, call: Call) -> Mapping[str, Any] | None:
        """Return the partner's reply to the do that the call undoes, if the undo reads it."""
        if call.action is Action.DO or not plan.spec_of(saga.state, self._plans).undo_reads_reply:
            return None
        async with db.connection(self._pool) as conn:
            return await store.read_do_reply(conn, saga.id, call.step)

    async def _record(self, run: Run, progress: Progress) -> bool:
        """Write the progress and the attempt that follows. Return false if the saga has ended or was released.

        Only the progress from one call to the next in the same direction is written without locking the order. Any
        other write locks the order first, and so knows for certain whether it was cancelled. Raises StaleLease.
        """
        before = run.saga
        state = self._interrupt(run, progress, before.cancelled)
        pause = self._pause(run, state, progress.wait)
        if state.direction is before.state.direction and self._may_call(run):
            run.saga = await self._recorder.save(self._attempt(before, state, progress.entries))
            self._report_needs_operator(before, run.saga)
            return True
        versions: list[TracedOrder] = []
        continues = False

        def decide(order: Order) -> Change:
            nonlocal state, pause, versions, continues
            locked_state = self._interrupt(run, progress, order.cancel_reason)
            if locked_state != state:
                state, pause = locked_state, self._pause(run, locked_state, progress.wait)
            versions = self._versions(run, order, state, progress.entries)
            if continues := self._may_call(run):
                return Change(self._attempt(before, state, progress.entries), versions)
            return Change(self._release(before, state, progress.entries, pause), versions)

        run.saga = await self._recorder.change(before, decide)
        if isinstance(plan.decide(state), Finish):
            self._emit_finished(run.saga, versions[-1].order)
            if _went_wrong(run, state):
                self._signals.emit(SagaWentWrong(run.saga.id))
        self._report_needs_operator(before, run.saga)
        run.due_in_seconds = None if pause is None else pause.seconds
        return continues

    def _interrupt(self, run: Run, progress: Progress, cancelled: Reason | None) -> SagaState:
        return plan.interrupt(progress.state, cancelled=cancelled, late=run.late, plans=self._plans)

    def _pause(self, run: Run, state: SagaState, wait: Wait | None) -> Wait | None:
        """Get the permit for the state's call, or return how long the saga must wait before it.

        A saga that starts compensating does not wait for the retry of its last call. Forward, no pause is longer than
        the time to the deadline.
        """
        run.release_permit()  # it belongs to the last call, or to one that will not be made
        pause = wait if state.direction is run.saga.state.direction else None
        if pause is None and isinstance(plan.decide(state), Call) and not self._stopping:
            admitted = self._partners.admit(state)
            if isinstance(admitted, Permit):
                run.permit = admitted
            else:
                pause = Wait(admitted.seconds, paused=admitted.paused)
        if pause is None or state.direction is SagaDirection.BACKWARD:
            return pause
        return replace(pause, seconds=min(pause.seconds, run.remaining_seconds))

    def _may_call(self, run: Run) -> bool:
        return run.permit is not None and not self._stopping

    def _attempt(self, saga: Saga, state: SagaState, entries: Sequence[StepLogEntry]) -> SagaWrite:
        """Return the write of the state and, before the call is made, its attempt. Renews the lease if necessary."""
        call = plan.decide(state)
        assert isinstance(call, Call)  # noqa: S101 - bug: only a call gets a permit
        state = plan.count_attempt(state)
        entries = [*entries, StepLogEntry(call.step, call.action, state.attempts, "attempted")]
        return SagaWrite(saga, state, entries, self._config.lease_seconds, self._config.owner)

    def _release(self, saga: Saga, state: SagaState, entries: Sequence[StepLogEntry], pause: Wait | None) -> SagaWrite:
        """Return the write of the state that ends the lease; any process may claim the saga when it is due.

        An undo needs an operator `needs_operator_seconds` after it first had to wait, or at once if retrying cannot
        fix the error. The time of an operator's own pause does not count.
        """
        operator_in_seconds = None
        is_paused = pause is not None and pause.paused
        if pause is not None and not is_paused and (pause.alarming or state.direction is SagaDirection.BACKWARD):
            operator_in_seconds = 0.0 if pause.alarming else self._config.needs_operator_seconds
        seconds = 0.0 if pause is None else pause.seconds
        return SagaWrite(
            saga, state, entries, seconds, owner=None, operator_in_seconds=operator_in_seconds, paused=is_paused
        )

    def _versions(self, run: Run, order: Order, state: SagaState, entries: Sequence[StepLogEntry]) -> list[TracedOrder]:
        """Return the versions of the order that the new state brings: when it turns, and when it ends."""
        versions = []
        if state.direction is not run.saga.state.direction:
            order = order_store.with_status(order, Status.COMPENSATING, state.reason)
            versions.append(TracedOrder(order, run.saga.trace))
        if isinstance(end := plan.decide(state), Finish):
            order = order_store.with_status(order, end.status, state.reason, _find_tracking_id(entries))
            versions.append(TracedOrder(order, self._end_trace(run, state)))
        return versions

    def _wait(self, attempts: int, outcome: Outcome) -> Wait:
        """Return a pause with full jitter. It is added to the partner's Retry-After, to spread out the retries."""
        jitter = self._config.retry.pause(attempts)
        if isinstance(outcome, Unknown):
            return Wait((outcome.retry_after_seconds or 0.0) + jitter, outcome.alarming)
        return Wait(jitter)

    def _end_trace(self, run: Run, end: SagaState) -> Mapping[str, str]:
        """Return the trace context of the final event. What goes wrong is traced: if not from its start, then late."""
        if not _went_wrong(run, end) or not self._signals.has_subscriber(SagaWentWrong) or run.saga.is_sampled:
            return trace_headers()
        return sampled_headers(store.late_span_id(run.saga.id))

    def _report_needs_operator(self, before: Saga, saga: Saga) -> None:
        """Report once, after the first write that returns the saga as needing an operator."""
        if saga.needs_operator and not before.needs_operator:
            state = saga.state
            log.error("saga.needs_operator", step=state.step, direction=state.direction, attempts=state.attempts)
            self._signals.emit(SagaWentWrong(saga.id))

    def _emit_finished(self, saga: Saga, order: Order) -> None:
        self._signals.crash_point("saga.finished")
        self._signals.emit(OrderFinished(order.id, order.status, order.status_reason))
        self._signals.emit(SagaFinished(order.status, order.status_reason, max(0.0, saga.age_seconds)))


def _describe_run(span: Span, state: SagaState) -> None:
    """Say on the span how the saga stands. One that compensates is an error."""
    span.set_attribute("orders.direction", state.direction)
    if state.direction is SagaDirection.BACKWARD:
        span.set_attribute("error.type", state.reason or "compensating")
        span.set_status(SpanStatus(StatusCode.ERROR, state.reason or "compensating"))


def _went_wrong(run: Run, end: SagaState) -> bool:
    return run.late or end.direction is SagaDirection.BACKWARD


def _log_entry(call: Call, attempt: int, outcome: Outcome, started: float) -> StepLogEntry:
    reply = outcome.reply if isinstance(outcome, Done) else None
    return StepLogEntry(
        call.step, call.action, attempt, gateway.label(outcome), gateway.detail(outcome), reply, started
    )


def _find_tracking_id(entries: Sequence[StepLogEntry]) -> str | None:
    return next(
        (entry.reply["tracking_id"] for entry in entries if entry.reply and "tracking_id" in entry.reply),
        None,
    )

"""The views of sagas for operators, the same from `/ops/sagas` and from the commands' `--json`.

They show steps and their outcomes, never order contents.
"""

import dataclasses
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.errors import OrderNotFound
from app.operations import audit, timeline
from app.operations.sagas import ActionOutcome, SagaAction
from app.operations.timeline import TimelineEntry
from app.operations.why_stuck import WhyStuck
from app.orders import store
from app.orders.model import Status, rfc3339
from app.saga import queries, unstarted


class SagaView(BaseModel):
    """The state of a saga; its id is its order's. Times are in seconds.

    `reason`: why it compensates, or will. `attempts`: of the current step, in this direction.
    `next_attempt_in_seconds`: until it is due, or until the lease of `lease_owner` ends; negative: it is overdue; null:
    it is finished. `stuck`: it needs an operator, or it is overdue or past its deadline by more than a minute.
    """

    order_id: str
    tenant: str
    status: str
    direction: str
    step: str | None
    attempts: int
    reason: str | None
    age_seconds: float
    next_attempt_in_seconds: float | None
    lease_owner: str | None
    deadline_at: str
    stuck: bool

    @classmethod
    def of(cls, saga: queries.SagaRow, **more: Any) -> Self:
        """Return the view of a saga."""
        return cls(
            order_id=str(saga.id),
            tenant=saga.tenant,
            status=saga.status,
            direction=saga.direction,
            step=saga.step,
            attempts=saga.attempts,
            reason=saga.reason,
            age_seconds=round(saga.age_seconds, 3),
            next_attempt_in_seconds=None if saga.finished_at else round(saga.next_attempt_in_seconds, 3),
            lease_owner=saga.lease_owner,
            deadline_at=rfc3339(saga.deadline_at),
            stuck=saga.stuck,
            **more,
        )


class ListedSaga(SagaView):
    """A saga in a listing. `last_outcome`, `last_detail`: of the last call to a partner; null: there was none."""

    last_outcome: str | None
    last_detail: str | None


class UnstartedOrder(BaseModel):
    """A pending order without a saga, because its `order.placed` is dead; it waits for an operator.

    `event`: `dead-letter`, or `purged` by an operator; `since`: when. `reason`: the last failure; null: the broker
    itself dead-lettered the event.
    """

    order_id: str
    tenant: str
    event: Literal["dead-letter", "purged"]
    since: str
    attempts: int
    reason: str | None
    age_seconds: float

    @classmethod
    def of(cls, order: unstarted.BlockedOrder) -> Self:
        """Show one."""
        return cls(
            order_id=str(order.order_id),
            tenant=order.tenant,
            event="purged" if order.purged else "dead-letter",
            since=rfc3339(order.since),
            attempts=order.attempts,
            reason=order.last_error,
            age_seconds=round(order.age_seconds, 3),
        )


class SagasAnswer(BaseModel):
    """Unfinished sagas: stuck ones first, then the others, each oldest first.

    `unstarted`: orders whose saga will not start until an operator acts. The limit applies to each list.
    """

    sagas: list[ListedSaga]
    unstarted: list[UnstartedOrder]


class StepLogView(BaseModel):
    """A line of a saga's log. `reply`: the ids that a partner gave."""

    at: str
    action: str
    step: str
    attempt: int
    outcome: str
    detail: str | None
    reply: dict[str, Any] | None


class OperatorActionView(BaseModel):
    """What an operator did. `outcome`: what changed, or why nothing did; `unfinished`: the command was killed.

    `reason`: empty when none was given.
    """

    at: str
    actor: str
    action: str
    reason: str
    outcome: str


class SagaAnswer(BaseModel):
    """An order with its saga, log and operator actions. `saga`: null before it starts, and after its retention.

    `log`: in order, at most the last thousand lines. `timeline` and `why_stuck`: as in `GET /orders/{id}/timeline`.
    """

    order_id: str
    tenant: str
    status: str
    status_reason: str | None
    version: int
    placed_at: str
    updated_at: str
    saga: SagaView | None
    log: list[StepLogView]
    operator_actions: list[OperatorActionView]
    timeline: list[TimelineEntry]
    why_stuck: WhyStuck | None


MESSAGES = {
    ActionOutcome.DUE: "is due at once",
    ActionOutcome.DUE_ALREADY: "was due already",
    ActionOutcome.UNDER_WAY: "is under way: a process has it, and was left alone",
    ActionOutcome.TURNS_BACK: "turns back",
    ActionOutcome.TURNED_BEFORE: "turns back already: nothing was changed",
    ActionOutcome.CANCELLED: "is cancelled: its saga had not started",
    ActionOutcome.ENDED_BEFORE: "has ended already, with everything undone: nothing was changed",
}


class SagaChanged(BaseModel):
    """The result of an operator's action. `message`: the outcome as text."""

    order_id: str
    action: str
    outcome: str
    message: str

    @classmethod
    def of(cls, order_id: UUID, action: SagaAction, outcome: ActionOutcome) -> Self:
        """Return the view of an outcome."""
        return cls(order_id=str(order_id), action=action, outcome=outcome, message=f"{order_id} {MESSAGES[outcome]}")


async def read_unfinished(pool: db.Pool, consumer: str, limit: int, status: str | None, *, stuck: bool) -> SagasAnswer:
    """Return unfinished sagas and orders that cannot start. `consumer`: the inbox name of the saga's consumer."""
    async with db.connection(pool) as conn:
        found = await queries.list_unfinished(conn, limit, status, stuck=stuck)
        given_up = [] if status == Status.COMPENSATING else await unstarted.list_blocked(conn, consumer, limit)
    return SagasAnswer(
        sagas=[ListedSaga.of(row.saga, last_outcome=row.outcome, last_detail=row.detail) for row in found],
        unstarted=[UnstartedOrder.of(order) for order in given_up],
    )


async def read_purged(pool: db.Pool, consumer: str, limit: int) -> list[UnstartedOrder]:
    """Return orders that cannot start because an operator purged their event, the longest dead first."""
    async with db.connection(pool) as conn:
        return [
            UnstartedOrder.of(order) for order in await unstarted.list_blocked(conn, consumer, limit, purged_only=True)
        ]


async def read_one(pool: db.Pool, order_id: UUID, consumer: str) -> SagaAnswer:
    """Return an order with its saga, its log, what operators did, and its timeline. Raises OrderNotFound."""
    story = await timeline.read(pool, order_id, None, consumer)
    async with db.connection(pool) as conn:
        order = await store.load(conn, order_id)
        if order is None:
            raise OrderNotFound(f"there is no order {order_id}")
        saga = await queries.find(conn, order_id)
        entries = await queries.read_log(conn, order_id)
        actions = await audit.of_order(conn, order_id)
    return SagaAnswer(
        order_id=str(order.id),
        tenant=order.tenant,
        status=order.status,
        status_reason=order.status_reason,
        version=order.version,
        placed_at=rfc3339(order.placed_at),
        updated_at=rfc3339(order.updated_at),
        saga=None if saga is None else SagaView.of(saga),
        log=[StepLogView(**dataclasses.asdict(entry) | {"at": rfc3339(entry.at)}) for entry in entries],
        operator_actions=[
            OperatorActionView(**dataclasses.asdict(action) | {"at": rfc3339(action.at)}) for action in actions
        ],
        timeline=story.entries,
        why_stuck=story.why_stuck,
    )

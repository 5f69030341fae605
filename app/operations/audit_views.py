"""The views of the audit log, the same from `GET /ops/actions` and from `orders audit --json`."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel

from app import db
from app.operations import audit, outbox
from app.operations.audit import ActionFilter, ActionRow
from app.operations.dead_letters import DeadLetterAction
from app.operations.partners import PartnerAction
from app.operations.sagas import SagaAction
from app.orders.model import rfc3339

MESSAGE_ACTIONS = ("dlq ", "outbox ")  # how the names of actions on messages begin
ACTIONS = (
    *SagaAction,
    *(f"dlq {action}" for action in DeadLetterAction if action is not DeadLetterAction.PEEK),
    outbox.ACTION,
    *PartnerAction,
)


class ActionTarget(BaseModel):
    """What an action was about. `id`: of the order or the message, the partner's name; null: every selected message."""

    kind: Literal["order", "message", "messages", "partner"]
    id: str | None

    @classmethod
    def of(cls, row: ActionRow) -> Self:
        """Return the target of a recorded action."""
        if row.action in set(PartnerAction):
            return cls(kind="partner", id=(row.selection or {}).get("partner"))
        if not row.action.startswith(MESSAGE_ACTIONS):
            return cls(kind="order", id=None if row.order_id is None else str(row.order_id))
        message: str | None = (row.selection or {}).get("id")
        return cls(kind="messages" if message is None else "message", id=message)


class ActionView(BaseModel):
    """What an operator did. `outcome`: what changed, or why nothing did; `unfinished`: it still runs, or was killed.

    `reason`: empty when none was given. `order_id`: the order that the target belongs to; null: none or several.
    `selection`: what the operator selected; `counts`: what the command counted; null: the action has none.
    """

    id: int
    at: str
    actor: str
    action: str
    target: ActionTarget
    order_id: str | None
    reason: str
    outcome: str
    selection: Mapping[str, Any] | None
    counts: Mapping[str, Any] | None

    @classmethod
    def of(cls, row: ActionRow) -> Self:
        """Return the view of a recorded action."""
        return cls(
            id=row.id,
            at=rfc3339(row.at),
            actor=row.actor,
            action=row.action,
            target=ActionTarget.of(row),
            order_id=None if row.order_id is None else str(row.order_id),
            reason=row.reason,
            outcome=row.outcome,
            selection=row.selection,
            counts=row.counts,
        )


class ActionsAnswer(BaseModel):
    """One page of the audit log, newest first. `next_cursor`: null on the last page."""

    actions: list[ActionView]
    next_cursor: str | None


async def read_actions(pool: db.Pool, wanted: ActionFilter, limit: int) -> ActionsAnswer:
    """Return up to `limit` actions, newest first. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        rows = await audit.list_newest(conn, wanted, limit + 1)
    shown = rows[:limit]
    cursor = str(shown[-1].id) if len(rows) > limit else None
    return ActionsAnswer(actions=[ActionView.of(row) for row in shown], next_cursor=cursor)

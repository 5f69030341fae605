"""The page of one order: why it is stuck or how it ended, its story as a picture, and what an operator can do.

A reader of its tenant sees the same without the actions. After an action the page follows it to its end.
"""

from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any
from uuid import UUID

from fastapi import HTTPException, Response
from pydantic import BaseModel

from app.api.ops import dlq
from app.api.ops.outbox import requeue_one
from app.api.ops.sagas import change as change_saga
from app.console.follow_up import follow
from app.console.route import Change, ChangeRequest, Page, console_router, go_to
from app.console.story import draw, explain_reason, name_waited_for
from app.errors import ValidationFailed
from app.operations import order_views, saga_views, timeline
from app.operations.audit import AuditActor
from app.operations.dead_letters import DeadLetterAction, Selection
from app.operations.order_views import OrderAction, OrderView
from app.operations.sagas import SagaAction
from app.orders.model import FINAL, Status
from app.pages.templates import duration
from app.values import immutable

router = console_router()


@immutable
class Offer:
    """How the page offers an action: the text of its button, and what it does."""

    label: str
    effect: str
    look: str = ""


OFFERS = {
    OrderAction.RETRY: Offer(
        "Retry now", "Makes the next attempt now instead of at its time, with the same idempotency key.", "primary"
    ),
    OrderAction.REQUEUE: Offer(
        "Requeue its event", "The relay publishes the parked event again, with all its attempts.", "primary"
    ),
    OrderAction.REPLAY: Offer(
        "Replay its event", "Sends the event to its consumer again, with all attempts. It takes effect once.", "primary"
    ),
    OrderAction.COMPENSATE: Offer(
        "Compensate", "Undoes every attempted step. The order ends rejected, and is never confirmed.", "danger"
    ),
    OrderAction.CANCEL: Offer(
        "Cancel for the customer",
        "Undoes the same; the order ends cancelled, as if the customer had done it.",
        "danger",
    ),
}

UNSTARTED = {  # what these do while the order has no saga
    OrderAction.COMPENSATE: "Ends the order at once, as cancelled by an operator. Its saga never starts.",
    OrderAction.CANCEL: "Ends the order at once, as cancelled by its customer. Its saga never starts.",
}


@router.get("/console/orders/{order_id}")
async def show(page: Page, order_id: UUID) -> Response:
    """Show an order to an operator, or to a reader of its tenant."""

    async def read() -> Mapping[str, Any]:
        view = await order_views.read(page.ops.pool, order_id, page.viewer.tenant, page.ops.consumer)
        return {
            "order": view.order.representation(),
            "tenant": view.order.tenant,
            "partner_ids": view.partner_ids if page.viewer.is_operator else {},
            "trace_id": next((entry.trace_id for entry in view.story.entries if entry.trace_id), None),
            "headline": describe(view),
            "reason": explain_reason(view.order.status_reason or view.order.cancel_reason),
            "stuck": view.story.why_stuck,
            "chain": follow(view.story),
            "picture": draw(view.story),
            "offers": _offers(view),
        }

    return await page.show("order.html", read)


@router.get("/console/orders/{order_id}/raw")
async def show_raw(page: Page, order_id: UUID) -> Response:
    """Answer with the JSON of `GET /ops/sagas/{id}` for an operator, of `GET /orders/{id}/timeline` for a reader."""
    pool, consumer = page.ops.pool, page.ops.consumer
    answer: BaseModel
    if page.viewer.tenant is None:
        answer = await saga_views.read_one(pool, order_id, consumer)
    else:
        answer = await timeline.read(pool, order_id, page.viewer.tenant, consumer)
    headers = {"Cache-Control": "no-store"}
    return Response(answer.model_dump_json(indent=2), headers=headers, media_type="application/json")


@router.post("/console/orders/{order_id}")
async def act(change: Change, order_id: UUID) -> Response:
    """Do what the operator asks for, then show the order again. A refusal says why."""
    actor = change.actor(change.reason())
    match change.field("action"):
        case OrderAction.RETRY | OrderAction.COMPENSATE | OrderAction.CANCEL as action:
            await change_saga(change.ops, order_id, SagaAction(action), actor)
        case OrderAction.REQUEUE:
            await _requeue(change, order_id, actor)
        case OrderAction.REPLAY:
            await _replay(change, order_id, actor)
        case other:
            raise ValidationFailed(f"there is no action {other!r}")
    change.console.feed.wake()
    return go_to(f"/console/orders/{order_id}")


def describe(view: OrderView) -> str:
    """Return the headline: what the order waits for, or else how it ended and how long that took."""
    order, stuck = view.order, view.story.why_stuck
    if stuck is not None:
        return f"Waits for {name_waited_for(stuck.waiting_for)}"
    if order.status in FINAL:
        took = duration((order.updated_at - order.placed_at).total_seconds())
        return (
            f"{order.status.capitalize()} in {took}"
            if order.status is Status.CONFIRMED
            else (f"{order.status.capitalize()} after {took}: {explain_reason(order.status_reason)}")
        )
    reason = order.status_reason or order.cancel_reason
    return "In progress" if reason is None else f"Is being undone: {explain_reason(reason)}"


def _offers(view: OrderView) -> dict[OrderAction, Offer]:
    unstarted = {} if view.has_saga else UNSTARTED
    offers = {action: OFFERS[action] for action in view.actions}
    return {action: replace(offer, effect=unstarted.get(action, offer.effect)) for action, offer in offers.items()}


async def _requeue(change: ChangeRequest, order_id: UUID, actor: AuditActor) -> None:
    view = await order_views.read(change.ops.pool, order_id, None, change.ops.consumer)
    if view.parked_event is None:
        raise HTTPException(HTTPStatus.CONFLICT, "no event of the order is parked: nothing was changed")
    await requeue_one(change.ops, view.parked_event, actor)


async def _replay(change: ChangeRequest, order_id: UUID, actor: AuditActor) -> None:
    """Replay the dead letter of `order.placed`, which has the id of its order."""
    letters, wanted = change.ops.dead_letters_of(None, ""), Selection(str(order_id), limit=1)
    summary = await dlq.act(change.ops, letters, DeadLetterAction.REPLAY, wanted, actor, lambda _: None)
    if not summary.matched and not summary.from_outbox:
        raise HTTPException(HTTPStatus.CONFLICT, "the order has no dead letter: nothing was changed")

"""The outbox: which events are not published yet, since when and why. Make parked ones pending again, one or all."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from fastapi import Response

from app.api.ops import outbox as ops_outbox
from app.console.route import Change, OperatorPage, console_router, go_to
from app.errors import ValidationFailed
from app.operations import outbox
from app.operations.dead_letters import as_uuid

router = console_router()

ADDRESS = "/console/outbox"
SHOWN = 100
AT_A_TIME = 1000  # events that one form requeues: well below a second
ALL = "all"


@router.get(ADDRESS)
async def show(page: OperatorPage) -> Response:
    """Show the unpublished events, or with `?parked=1` only those that wait for an operator."""
    query = page.request.query_params
    parked_only = query.get("parked") == "1"

    async def read() -> Mapping[str, Any]:
        now = await outbox.read_now(page.ops.pool, SHOWN, parked_only=parked_only)
        return {"outbox": now, "parked_only": parked_only, "shown": SHOWN, "at_a_time": AT_A_TIME}

    requeued = query.get("requeued", "")
    return await page.show(
        "outbox.html", read, requeued=int(requeued) if requeued.isdecimal() and len(requeued) < len("1000000") else None
    )


@router.post(f"{ADDRESS}/requeue")
async def requeue(change: Change) -> Response:
    """Requeue one event and show its order, or the parked ones and show how many."""
    wanted, actor = change.field("id"), change.actor(change.reason())
    if wanted == ALL:
        requeued = await ops_outbox.requeue_all(change.ops, AT_A_TIME, actor)
        return go_to(f"{ADDRESS}?parked=1&requeued={requeued}")
    order_id = await ops_outbox.requeue_one(change.ops, _row_id(wanted), actor)
    return go_to(f"{ADDRESS}?parked=1&requeued=1" if order_id is None else f"/console/orders/{order_id}")


def _row_id(text: str) -> UUID:
    row_id = as_uuid(text)
    if row_id is None:
        raise ValidationFailed("this is not the id of an event")
    return row_id

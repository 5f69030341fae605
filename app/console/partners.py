"""The partners' page: which partners are called, and a form that pauses or resumes the calls to one."""

from collections.abc import Mapping
from typing import Any

from fastapi import Response

from app.api.ops.partners import apply_pause, apply_resume
from app.api.params import parse_pause
from app.console.route import Change, OperatorPage, console_router, go_to
from app.errors import ValidationFailed
from app.operations import partner_views, partners
from app.saga import steps

router = console_router()

ADDRESS = "/console/partners"
PERIODS = ("5m", "30m", "2h")  # offered; the field takes any other


@router.get(ADDRESS)
async def show(page: OperatorPage) -> Response:
    """Show each partner, and the form."""

    async def read() -> Mapping[str, Any]:
        answer = await partner_views.read_partners(page.ops.pool, page.ops.circuit_state)
        return {"partners": answer.partners}

    return await page.show("partners.html", read, names=steps.partners(), periods=PERIODS)


@router.post(f"{ADDRESS}/pause")
async def pause(change: Change) -> Response:
    """Pause a partner. If that would reject orders, or they cannot be counted, ask first whether it is meant."""
    partner, period, reason = partners.require(change.field("partner")), change.field("for"), change.reason()
    try:
        seconds = parse_pause(period)
    except ValueError as error:
        raise ValidationFailed(f"the time of the pause {error}") from error
    if not change.field("confirmed"):
        late = await partners.preview_pause(change.ops.pool, partner, seconds)
        if late is None or late.number or late.placed_before is not None:
            return change.answer(
                "partner_pause.html", partner=partner, period=period, seconds=seconds, reason=reason, late=late
            )
    await apply_pause(change.ops, partner, seconds, change.actor(reason))
    return go_to(f"{ADDRESS}#{partner}")


@router.post(f"{ADDRESS}/resume")
async def resume(change: Change) -> Response:
    """End the pause of a partner."""
    partner = partners.require(change.field("partner"))
    await apply_resume(change.ops, partner, change.actor(change.reason()))
    return go_to(f"{ADDRESS}#{partner}")

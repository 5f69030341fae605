"""`/ops/partners`, for operators: show partners, pause calls to one, resume them.

The writes need no Idempotency-Key: a repeated pause replaces the first one, and a second resume changes nothing.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

import structlog
from fastapi import Body
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, WithJsonSchema

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED, OpsDeps
from app.api.ops.route import Deps, NoQuery, Operator, operator_router
from app.api.params import PAUSE, ReasonText, StrictModel, parse_pause
from app.operations import partner_views, partners
from app.operations.audit import AuditActor
from app.operations.partner_views import PartnerChanged, PartnersAnswer
from app.operations.partners import PartnerAction
from app.saga.facts import PartnerPauseChanged

log = structlog.get_logger(__name__)
router = operator_router("/ops/partners")

PauseSeconds = Annotated[float, BeforeValidator(parse_pause), WithJsonSchema({"type": "string", "pattern": PAUSE})]


class PauseRequest(StrictModel):
    """The body of `POST /ops/partners/{partner}/pause`."""

    seconds: PauseSeconds = Field(
        alias="for", description="how long: seconds, or a number followed by s, m, h or d, as a string"
    )
    reason: ReasonText = Field(description="the reason, recorded with the action")


class ResumeRequest(StrictModel):
    """The body of `POST /ops/partners/{partner}/resume`."""

    reason: ReasonText = Field(description="the reason, recorded with the action")


PAUSED: Mapping[str, Any] = {
    "paused_at": "2026-11-21T04:02:11.000000Z",
    "ends_at": "2026-11-21T04:32:11.000000Z",
    "actor": "admin-token",
    "reason": "the payment provider asked for it",
}
PARTNERS: Mapping[str, Any] = {
    "partners": [
        {"partner": "inventory", "pause": None, "circuit": "closed", "sagas": 0},
        {"partner": "payment", "pause": PAUSED, "circuit": "closed", "sagas": 12},
        {"partner": "shipping", "pause": None, "circuit": "closed", "sagas": 1},
    ]
}
PAUSE_ANSWER: Mapping[str, Any] = {
    "partner": "payment",
    "action": "partner pause",
    "outcome": "paused",
    "message": "calls to payment are paused until 2026-11-21T04:32:11.000000Z",
    "pause": PAUSED,
    "orders_too_late": 12,
    "warning": "12 unfinished orders reach their deadline before then, and would be rejected; so would orders placed"
    " before 2026-11-21T04:17:11.000000Z",
}
RESUME_ANSWER: Mapping[str, Any] = {
    "partner": "payment",
    "action": "partner resume",
    "outcome": "resumed",
    "message": "calls to payment are resumed",
    "pause": None,
    "orders_too_late": 0,
    "warning": None,
}
UNKNOWN = {
    HTTPStatus.NOT_FOUND: (
        "partner-not-found",
        "there is no such partner: the partners are inventory, payment, shipping",
    )
}
WRITE_REFUSALS = openapi.problems(*openapi.BODY_REFUSALS, HTTPStatus.NOT_FOUND, examples=UNKNOWN)


def _example(body: Mapping[str, str]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"example": body}}}}


@router.get(
    "",
    operation_id="listPartners",
    summary="Partners, and which of them are paused",
    response_model=PartnersAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(PartnersAnswer, "Every partner", PARTNERS, "Cache-Control"),
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, examples=NOT_OFFERED),
    },
)
async def list_partners(deps: Deps, _: NoQuery) -> JSONResponse:
    """Show each partner with its pause, its circuit as this process sees it, and the sagas that are at its steps."""
    answer = await partner_views.read_partners(deps.pool, deps.circuit_state)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/{partner}/pause",
    operation_id="pausePartner",
    summary="Pause calls to a partner",
    response_model=PartnerChanged,
    responses={
        HTTPStatus.OK.value: openapi.response(PartnerChanged, "The outcome", PAUSE_ANSWER, "Cache-Control"),
        **WRITE_REFUSALS,
    },
    openapi_extra=_example({"for": "30m", "reason": "the payment provider asked for it"}),
)
async def pause(
    deps: Deps, operator: Operator, partner: str, body: Annotated[PauseRequest, Body()], _: NoQuery
) -> JSONResponse:
    """Stop every call to the partner for a time, do and undo. Orders are still taken, and their sagas wait.

    Deadlines run on: `orders_too_late` counts the unfinished orders that would be rejected before the pause ends. The
    pause ends by itself, or when it is resumed. A pause that is in force is replaced. Every process obeys within about
    a second; a call that has started is not interrupted. No Idempotency-Key is needed: a repeat replaces the pause.
    """
    changed = await apply_pause(deps, partner, body.seconds, AuditActor(operator.subject, body.reason))
    return JSONResponse(changed.model_dump(), headers=NO_STORE)


@router.post(
    "/{partner}/resume",
    operation_id="resumePartner",
    summary="Resume calls to a partner",
    response_model=PartnerChanged,
    responses={
        HTTPStatus.OK.value: openapi.response(PartnerChanged, "The outcome", RESUME_ANSWER, "Cache-Control"),
        **WRITE_REFUSALS,
    },
    openapi_extra=_example({"reason": "the payment provider is back"}),
)
async def resume(
    deps: Deps, operator: Operator, partner: str, body: Annotated[ResumeRequest, Body()], _: NoQuery
) -> JSONResponse:
    """End the pause of the partner now. The sagas that wait for it are due within about a second.

    No Idempotency-Key is needed: a second resume changes nothing.
    """
    changed = await apply_resume(deps, partner, AuditActor(operator.subject, body.reason))
    return JSONResponse(changed.model_dump(), headers=NO_STORE)


async def apply_pause(deps: OpsDeps, partner: str, seconds: float, actor: AuditActor) -> PartnerChanged:
    """Pause a partner, and let this process obey at once. Raises PartnerNotFound."""
    begun, outcome = await partners.pause(deps.pool, partner, seconds, actor)
    _emit(deps, PartnerAction.PAUSE, partner, actor)
    return PartnerChanged.of_pause(begun, outcome, await partners.find_late(deps.pool, partner, begun.ends_at))


async def apply_resume(deps: OpsDeps, partner: str, actor: AuditActor) -> PartnerChanged:
    """Resume a partner, and let this process continue at once. Raises PartnerNotFound."""
    outcome = await partners.resume(deps.pool, partner, actor)
    _emit(deps, PartnerAction.RESUME, partner, actor)
    return PartnerChanged.of_resume(partner, outcome)


def _emit(deps: OpsDeps, action: PartnerAction, partner: str, actor: AuditActor) -> None:
    deps.signals.emit(PartnerPauseChanged())
    log.info("partner.operated", action=action, operator=actor.name, partner=partner)

"""The first page: what is wrong first, then how the service does, and whether what it needs is there."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import Response

from app.api.health import Health
from app.console.route import OperatorPage, PageRequest, console_router
from app.errors import Unavailable
from app.operations.concerns import Concern, ConcernKind
from app.operations.overview import OverviewAnswer
from app.operations.recent import SLOT_SECONDS, SLOTS

router = console_router()

# Where an operator looks next. An invariant has no page: a command explains its violation.
PLACES: Mapping[ConcernKind, str] = {
    ConcernKind.NEEDS_OPERATOR: "/console/orders?needs_operator=1",
    ConcernKind.STUCK: "/console/orders?stuck=1",
    ConcernKind.CANNOT_START: "/console/orders?stuck=1",
    ConcernKind.NO_SAGA: "/console/orders?status=pending",
    ConcernKind.OLD_SAGA: "/console/orders/{subject}",
    ConcernKind.DEAD_LETTERS: "/console/dead-letters",
    ConcernKind.PARKED: "/console/outbox?parked=1",
    ConcernKind.OLD_EVENT: "/console/outbox",
    ConcernKind.CIRCUIT_OPEN: "/console/partners#{subject}",
    ConcernKind.PAUSED: "/console/partners#{subject}",
}
AUDITED = "operator_actions"  # the table that the audit page shows


@router.get("/console")
async def show(page: OperatorPage) -> Response:
    """Show what needs attention, then how the service does."""

    async def read() -> Mapping[str, Any]:
        health: Health = page.request.state.health
        readiness, overview = await asyncio.gather(health.readiness(), _read_overview(page))
        return {
            "overview": overview,
            "concerns": [(concern, _place_of(concern)) for concern in overview.concerns] if overview else [],
            "checks": readiness.checks,
        }

    return await page.show("overview.html", read, minutes=SLOTS * SLOT_SECONDS // 60)


async def _read_overview(page: PageRequest) -> OverviewAnswer | None:
    """Return the overview; None while Postgres does not answer: the page says so, and shows the rest."""
    try:
        return await page.console.overview()
    except Unavailable:
        return None


def _place_of(concern: Concern) -> str | None:
    if concern.subject == AUDITED:
        return "/console/audit"
    place = PLACES.get(concern.kind)
    return None if place is None else place.format(subject=concern.subject)

"""The audit page: what operators did, and why, newest first."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode
from uuid import UUID

from fastapi import Query, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator

from app.api.ops.actions import Cursor
from app.api.params import parse_seconds, storable_text
from app.console.route import OperatorPage, console_router
from app.operations import audit_views
from app.operations.audit import ActionFilter
from app.operations.audit_views import ACTIONS

router = console_router()

PAGE_ROWS = 50
PERIODS = ("15m", "1h", "24h", "7d")  # offered; the address may have any other


def _drop_blank(value: object) -> object:
    """Read a field that was left empty as a filter that is not set."""
    return (value.strip() or None) if isinstance(value, str) else value


def _check_period(text: str) -> str:
    parse_seconds(text)
    return text


Blank = BeforeValidator(_drop_blank)
Text = Annotated[Annotated[str, AfterValidator(storable_text)] | None, Blank]


class AuditQuery(BaseModel):
    """The query of the page: filters, and where to continue."""

    order: Annotated[UUID | None, Blank] = None
    since: Annotated[Annotated[str, AfterValidator(_check_period)] | None, Blank] = None
    actor: Text = None
    action: Text = None
    cursor: Annotated[Cursor | None, Blank] = None

    @property
    def filters(self) -> dict[str, str]:
        """The filters that are set, as the address has them."""
        return {name: str(value) for name, value in self if value is not None and name != "cursor"}

    @property
    def wanted(self) -> ActionFilter:
        """What the operation selects by."""
        since_seconds = None if self.since is None else parse_seconds(self.since)
        return ActionFilter(self.order, since_seconds, self.cursor, self.actor, self.action)


@router.get("/console/audit")
async def show(page: OperatorPage, query: Annotated[AuditQuery, Query()]) -> Response:
    """Show the actions that match, newest first."""

    async def read() -> Mapping[str, Any]:
        answer = await audit_views.read_actions(page.ops.pool, query.wanted, PAGE_ROWS)
        older = None if answer.next_cursor is None else _address({**query.filters, "cursor": answer.next_cursor})
        return {
            "actions": answer.actions,
            "older": older,
            "newest": None if query.cursor is None else _address(query.filters),
            "is_filtered": bool(query.filters),
        }

    periods = [*PERIODS, *({query.since} - {None, *PERIODS})]
    return await page.show("audit.html", read, query=query, actions_known=ACTIONS, periods=periods)


def _address(values: Mapping[str, str]) -> str:
    return "/console/audit" + (f"?{urlencode(values)}" if values else "")

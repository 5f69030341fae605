"""`/ops/actions`, for operators: the audit log, newest first."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, WithJsonSchema

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED
from app.api.ops.route import Deps, operator_router
from app.api.params import DEFAULT_LIMIT, Limit, Since, StrictModel
from app.operations import audit_views
from app.operations.audit import ActionFilter
from app.operations.audit_views import ActionsAnswer

router = operator_router("/ops/actions")

CURSOR = "^[1-9][0-9]{0,17}$"  # every such number is a position in the log


def _parse_cursor(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(CURSOR.strip("^$"), value):
        raise ValueError("is not a cursor of this listing")
    return int(value)


Cursor = Annotated[int, BeforeValidator(_parse_cursor), WithJsonSchema({"type": "string", "pattern": CURSOR})]


class ListActions(StrictModel):
    """The query of `GET /ops/actions`."""

    order: UUID | None = Field(default=None, description="only actions on this order, or on a message of it")
    since: Since | None = Field(
        default=None, description="only actions within this time: seconds, or a number followed by s, m, h or d"
    )
    limit: Limit = Field(default=DEFAULT_LIMIT, description="actions in one answer")
    cursor: Cursor | None = Field(default=None, description="`next_cursor` of the previous answer: continue after it")


ACTIONS: Mapping[str, Any] = {
    "actions": [
        {
            "id": 42,
            "at": "2026-11-21T04:08:10.000000Z",
            "actor": "admin-token",
            "action": "retry",
            "target": {"kind": "order", "id": openapi.ORDER["id"]},
            "order_id": openapi.ORDER["id"],
            "reason": "the payment provider is back",
            "outcome": "due",
            "selection": None,
            "counts": None,
        },
        {
            "id": 41,
            "at": "2026-11-21T04:02:11.000000Z",
            "actor": "cli:ada",
            "action": "dlq replay",
            "target": {"kind": "messages", "id": None},
            "order_id": None,
            "reason": "",
            "outcome": "done",
            "selection": {"since_seconds": 900, "limit": 100},
            "counts": {"depth": 3, "looked_at": 3, "matched": 2, "from_outbox": False},
        },
    ],
    "next_cursor": "41",
}


@router.get(
    "",
    operation_id="listActions",
    summary="What operators did, and why",
    response_model=ActionsAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(ActionsAnswer, "One page, newest first", ACTIONS, "Cache-Control"),
        **openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, examples=NOT_OFFERED),
    },
)
async def list_actions(deps: Deps, query: Annotated[ListActions, Query()]) -> JSONResponse:
    """Return the actions of operators, newest first, `limit` at a time; `next_cursor` leads to the older ones.

    Every change that an operator made by route or by command is here, also one that was refused or changed nothing.
    """
    wanted = ActionFilter(query.order, query.since, query.cursor)
    answer = await audit_views.read_actions(deps.pool, wanted, query.limit)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)

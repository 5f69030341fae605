"""`/ops/dlq`, for operators: show dead letters with their reasons, replay them, purge them.

The writes need no Idempotency-Key: each acts on the dead letters that exist, and a repeat no longer finds them.
An interrupted replay may leave a duplicate behind, and the inbox processes only one of them.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any

import structlog
from fastapi import Body, Query
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, WithJsonSchema

from app.api import openapi
from app.api.ops.deps import NO_STORE, NOT_OFFERED, OpsDeps
from app.api.ops.route import Deps, NoQuery, Operator, operator_router
from app.api.params import (
    DEFAULT_LIMIT,
    LETTER_ID,
    MAX_LINE_CHARACTERS,
    Limit,
    ReasonText,
    Since,
    StrictModel,
    parse_letter_id,
    whole_number,
)
from app.auth import guards
from app.messaging.facts import EventsPending
from app.operations.audit import AuditActor
from app.operations.dead_letter_views import DeadLettersAnswer, TreatedAnswer
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary

log = structlog.get_logger(__name__)
router = operator_router("/ops/dlq")

MAX_LETTERS, DEFAULT_LETTERS = 1000, 100  # per request, which should take no longer than a second

LetterId = Annotated[
    str,
    BeforeValidator(parse_letter_id),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE_CHARACTERS, "pattern": LETTER_ID}),
]


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError("must be the name of a queue")
    return value


# `openapi.install` adds the names of the queues; `OpsDeps.dead_letters_of` checks them.
Queue = Annotated[Any, BeforeValidator(_refuse_null), WithJsonSchema({"x-queue": True})]


class DeadLetterSelection(StrictModel):
    """Selects dead letters."""

    queue: Queue = Field(default=None, description="the name of a queue, or of its dead-letter queue")
    id: LetterId | None = Field(default=None, description="only the dead letter with this id")
    since: Since | None = Field(
        default=None,
        description="only dead letters that failed within this time: seconds, or a number followed by s, m, h or d",
    )


class PeekDeadLetters(DeadLetterSelection):
    """The query of `GET /ops/dlq`."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="dead letters in one answer")


class DeadLetterActionRequest(DeadLetterSelection):
    """The body of `POST /ops/dlq/replay` and `POST /ops/dlq/purge`. `{}`: all, up to the limit."""

    limit: Annotated[StrictInt, Field(ge=1, le=MAX_LETTERS), BeforeValidator(whole_number)] = Field(
        default=DEFAULT_LETTERS, description="the maximum number of dead letters"
    )
    dry_run: StrictBool = Field(default=False, description="change nothing; report what would be done")
    reason: ReasonText | None = Field(default=None, description="the reason, recorded with the action")


ActionBody = Annotated[DeadLetterActionRequest, Body(default_factory=DeadLetterActionRequest)]

DEAD_LETTER: Mapping[str, Any] = {
    "id": "01890a5d-ac97-7001-8000-000000000000",
    "type": "orders.order.placed.v1",
    "order_id": openapi.ORDER["id"],
    "tenant": "default",
    "reason": "UniqueViolationError: duplicate key",
    "attempts": 7,
    "first_failure_at": "2026-11-21T04:02:01.000000Z",
    "last_failure_at": "2026-11-21T04:02:11.000000Z",
    "inbox": "failed 7 times, last error: UniqueViolationError: duplicate key",
    "replay": "is tried again, with all attempts",
}
PEEKED: Mapping[str, Any] = {"queue": "orders.saga", "depth": 1, "looked_at": 1, "dead_letters": [DEAD_LETTER]}
BUSY = {
    **NOT_OFFERED,
    HTTPStatus.CONFLICT: ("dead-letters-busy", "somebody else is going over the dead letters; try again in a moment"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("broker-unavailable", "the service cannot take this request right now"),
}
REFUSALS = openapi.problems(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY, examples=BUSY)
ACTED: Mapping[str, Any] = {**PEEKED, "dry_run": False, "done": 1, "from_outbox": False}
WRITE_REFUSALS = REFUSALS | openapi.problems(*openapi.BODY_REFUSALS, examples=BUSY)


@router.get(
    "",
    operation_id="listDeadLetters",
    summary="Dead letters, and what a replay would do",
    response_model=DeadLettersAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(DeadLettersAnswer, "The first dead letters", PEEKED, "Cache-Control"),
        **REFUSALS,
    },
)
async def peek(deps: Deps, query: Annotated[PeekDeadLetters, Query()]) -> JSONResponse:
    """Show dead letters with their reasons and their state in the inbox. They stay in the queue, in order."""
    letters = deps.dead_letters_of(query.queue, "/query/queue")
    findings: list[Finding] = []
    selection = Selection(query.id, query.since, query.limit)
    summary = await letters.scan(DeadLetterAction.PEEK, selection, findings.append)
    answer = DeadLettersAnswer.of(letters.queue.name, summary, findings)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/replay",
    operation_id="replayDeadLetters",
    summary="Send dead letters again",
    response_model=TreatedAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(
            TreatedAnswer, "The dead letters were sent again", ACTED, "Cache-Control"
        ),
        **WRITE_REFUSALS,
    },
)
async def replay(deps: Deps, operator: Operator, body: ActionBody, _: NoQuery) -> JSONResponse:
    """Reset each dead letter's attempts, and send it to its queue with the same id. No message takes effect twice.

    If no dead letter has the given `id`, the event is sent again from the outbox, unless its order has started.
    No Idempotency-Key is needed: a replayed message is not a dead letter any more, and the inbox detects duplicates.
    """
    return await _act(deps, operator, body, DeadLetterAction.REPLAY)


@router.post(
    "/purge",
    operation_id="purgeDeadLetters",
    summary="Remove dead letters",
    response_model=TreatedAnswer,
    responses={
        HTTPStatus.OK.value: openapi.response(TreatedAnswer, "The dead letters were removed", ACTED, "Cache-Control"),
        **WRITE_REFUSALS,
    },
)
async def purge(deps: Deps, operator: Operator, body: ActionBody, _: NoQuery) -> JSONResponse:
    """Remove dead letters permanently.

    The service does not send a purged event again, even if its order waits for it: `GET /ops/sagas` lists that order as
    purged until the event is replayed or the order has ended.

    No Idempotency-Key is needed: a removed message cannot be removed again.
    """
    return await _act(deps, operator, body, DeadLetterAction.PURGE)


async def _act(
    deps: OpsDeps, operator: guards.CurrentOperator, body: DeadLetterActionRequest, action: DeadLetterAction
) -> JSONResponse:
    letters = deps.dead_letters_of(body.queue, "/queue")
    selection = Selection(body.id, body.since, body.limit)
    findings: list[Finding] = []
    if body.dry_run:
        summary = await letters.scan(action, selection, findings.append)
    else:
        actor = AuditActor(operator.subject, body.reason or "")
        summary = await act(deps, letters, action, selection, actor, findings.append)
    answer = TreatedAnswer.of_scan(letters.queue.name, summary, findings, dry_run=body.dry_run)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


async def act(
    deps: OpsDeps,
    letters: DeadLetters,
    action: DeadLetterAction,
    selection: Selection,
    actor: AuditActor,
    found: Callable[[Finding], None],
) -> Summary:
    """Replay or purge the selected dead letters, and wake the relay. The same as `DeadLetters.scan` otherwise."""
    summary = await letters.scan(action, selection, found, actor=actor)
    deps.signals.emit(EventsPending())
    log.info("dlq.gone_over", action=action, operator=actor.name, done=summary.matched)
    return summary

"""`/ops/dlq`, for operators: what was given up and why; sending it again; removing it.

The writes need no Idempotency-Key: each does what it says to the dead letters that are there, and finds none of them
there the second time. A replay that is cut off may leave a copy behind; the inbox lets one of them take effect.
"""

from collections.abc import Mapping
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
    DURATION,
    LETTER_ID,
    MAX_LINE_CHARACTERS,
    Limit,
    ReasonText,
    StrictModel,
    letter_id,
    seconds,
    whole_number,
)
from app.auth import guards
from app.messaging.facts import EventsPending
from app.operations.audit import AuditActor
from app.operations.dead_letter_views import DeadLettersAnswer, TreatedAnswer
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary

log = structlog.get_logger(__name__)
router = operator_router("/ops/dlq")

MAX_TREATED, DEFAULT_TREATED = 1000, 100  # dead letters in one request, which should not take longer than a second

LetterId = Annotated[
    str,
    BeforeValidator(letter_id),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_LINE_CHARACTERS, "pattern": LETTER_ID}),
]
Since = Annotated[float, BeforeValidator(seconds), WithJsonSchema({"type": "string", "pattern": DURATION})]


def _given(value: object) -> object:
    if value is None:
        raise ValueError("must be the name of a queue")
    return value


# Which queues there are, `openapi.install` and `OpsDeps.dead_letters_of` know.
Queue = Annotated[Any, BeforeValidator(_given), WithJsonSchema({"x-queue": True})]


class Selecting(StrictModel):
    """Which dead letters are meant."""

    queue: Queue = Field(default=None, description="the queue that gave them up, or its dead-letter queue")
    id: LetterId | None = Field(default=None, description="only the one of this id")
    since: Since | None = Field(
        default=None, description="only those that failed within this time: seconds, or a number with s, m, h or d"
    )


class PeekDeadLetters(Selecting):
    """The query of `GET /ops/dlq`."""

    limit: Limit = Field(default=DEFAULT_LIMIT, description="dead letters in one answer")


class TreatDeadLetters(Selecting):
    """The body of `POST /ops/dlq/replay` and `POST /ops/dlq/purge`; `{}` means all that there are, up to the limit."""

    limit: Annotated[StrictInt, Field(ge=1, le=MAX_TREATED), BeforeValidator(whole_number)] = Field(
        default=DEFAULT_TREATED, description="at most so many"
    )
    dry_run: StrictBool = Field(default=False, description="change nothing; tell what would be done")
    reason: ReasonText | None = Field(default=None, description="why; it is kept with what was done")


TreatBody = Annotated[TreatDeadLetters, Body(default_factory=TreatDeadLetters)]

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
TREATED: Mapping[str, Any] = {**PEEKED, "dry_run": False, "done": 1, "from_outbox": False}
WRITE_REFUSALS = REFUSALS | openapi.problems(*openapi.BODY_REFUSALS, examples=BUSY)


@router.get(
    "",
    operation_id="listDeadLetters",
    summary="Dead letters, and what a replay would do",
    response_model=DeadLettersAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(DeadLettersAnswer, "The first of them", PEEKED, "Cache-Control"),
        **REFUSALS,
    },
)
async def peek(deps: Deps, asked: Annotated[PeekDeadLetters, Query()]) -> JSONResponse:
    """Show dead letters with their reasons and what the inbox knows of them. They stay where they are, in order."""
    letters = deps.dead_letters_of(asked.queue, "/query/queue")
    summary, findings = await _scan(letters, DeadLetterAction.PEEK, asked, asked.limit)
    answer = DeadLettersAnswer.of(letters.queue.name, summary, findings)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.post(
    "/replay",
    operation_id="replayDeadLetters",
    summary="Send dead letters again",
    response_model=TreatedAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(TreatedAnswer, "They were sent", TREATED, "Cache-Control"),
        **WRITE_REFUSALS,
    },
)
async def replay(deps: Deps, operator: Operator, asked: TreatBody, _: NoQuery) -> JSONResponse:
    """Give each its attempts again and send it to its queue, with its id. What took effect does not do so twice.

    With an `id` that no dead letter has, the event is sent again from the outbox if its order has not started.
    It needs no Idempotency-Key: what was replayed is no dead letter any more, and the inbox knows a copy by its id.
    """
    return await _treat(deps, operator, asked, DeadLetterAction.REPLAY)


@router.post(
    "/purge",
    operation_id="purgeDeadLetters",
    summary="Remove dead letters",
    response_model=TreatedAnswer,
    responses={
        HTTPStatus.OK.value: openapi.answered(TreatedAnswer, "They were removed", TREATED, "Cache-Control"),
        **WRITE_REFUSALS,
    },
)
async def purge(deps: Deps, operator: Operator, asked: TreatBody, _: NoQuery) -> JSONResponse:
    """Remove each for good.

    An event that its order still waits for is not sent again by the service: `GET /ops/sagas` lists that order as
    purged until the event is replayed or the order has ended.

    It needs no Idempotency-Key: what was removed cannot be removed again.
    """
    return await _treat(deps, operator, asked, DeadLetterAction.PURGE)


async def _treat(
    deps: OpsDeps, operator: guards.CurrentOperator, asked: TreatDeadLetters, action: DeadLetterAction
) -> JSONResponse:
    actor = None if asked.dry_run else AuditActor(operator.subject, asked.reason or "")
    letters = deps.dead_letters_of(asked.queue, "/queue")
    summary, findings = await _scan(letters, action, asked, asked.limit, actor)
    answer = TreatedAnswer.of_scan(letters.queue.name, summary, findings, dry_run=asked.dry_run)
    if not asked.dry_run:
        deps.signals.emit(EventsPending())
        log.info("dlq.gone_over", action=action, operator=operator.subject, done=answer.done)
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


async def _scan(
    letters: DeadLetters, action: DeadLetterAction, asked: Selecting, limit: int, actor: AuditActor | None = None
) -> tuple[Summary, list[Finding]]:
    findings: list[Finding] = []
    summary = await letters.scan(action, Selection(asked.id, asked.since, limit), findings.append, actor=actor)
    return summary, findings

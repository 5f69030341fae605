"""Delivers a call to its partner, with whatever goes wrong on the way and on the way back."""

from dataclasses import replace
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandbox import calls, faults
from sandbox.calls import Act, B, Call, Verdict
from sandbox.connection import SILENCE_SECONDS, Connection, NoAnswer
from sandbox.faults import Rule
from sandbox.ledger import Ledger
from sandbox.problems import MEDIA_TYPE, problem, respond

NOT_DONE = frozenset({"error", "unavailable", "timeout_before", "reset_before"})
UNHEARD = frozenset({"timeout_after", "reset_after"})
RETRY_AFTER_SECONDS = "1"
UNREADABLE = b'{"saga_id": "'


async def deliver(request: Request, call: Call[B], act: Act[B]) -> Response:
    """Decide the call and answer it, unless a fault rule has it otherwise."""
    ledger: Ledger = request.state.ledger
    with ledger.transaction() as db:
        rule = faults.choose(db, call.operation.name, call.body.model_dump(mode="json"))
    if rule is None:
        return _answer(calls.decide(ledger, call, act))
    connection: Connection = request.state.connection
    if not rule.kind.startswith("timeout"):
        await connection.pause(rule.delay_seconds)
    if rule.kind in NOT_DONE:
        calls.failed(ledger, call, rule.kind)
        return _failure(rule)
    verdict = calls.decide(ledger, replace(call, refuse=rule.kind == "refuse"), act)
    if rule.kind == "duplicate":
        calls.decide(ledger, call, act)  # decisions are made one at a time: two at once are one after the other
    if rule.kind == "garbage":
        return Response(UNREADABLE, verdict.status, media_type="application/json")
    return _failure(rule) if rule.kind in UNHEARD else _answer(verdict)


def _answer(verdict: Verdict) -> Response:
    if verdict.silent:
        return NoAnswer(SILENCE_SECONDS, reset=False)
    media_type = MEDIA_TYPE if verdict.status >= HTTPStatus.BAD_REQUEST else "application/json"
    return JSONResponse(dict(verdict.body), verdict.status, media_type=media_type)


def _failure(rule: Rule) -> Response:
    if rule.kind == "error":
        return respond(problem(500, "partner-error", "The partner failed; nothing was done."))
    if rule.kind == "unavailable":
        body = problem(503, "partner-unavailable", "The partner is busy; nothing was done.")
        return respond(body, {"Retry-After": RETRY_AFTER_SECONDS})
    if rule.kind.startswith("reset"):
        return NoAnswer(0, reset=True)
    return NoAnswer(rule.delay_seconds or SILENCE_SECONDS, reset=False)

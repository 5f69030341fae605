"""Deliver a call to its partner, and inject the fault that a rule asks for, before or after the decision."""

from dataclasses import replace
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandbox import calls, faults
from sandbox.calls import B, Decider, PartnerCall, PartnerDecision
from sandbox.connection import SILENCE_SECONDS, ClientConnection, NoAnswer
from sandbox.faults import Rule
from sandbox.ledger import Ledger
from sandbox.problems import MEDIA_TYPE, problem, respond

FAIL_BEFORE = frozenset({"error", "unavailable", "timeout_before", "reset_before"})
ANSWER_LOST = frozenset({"timeout_after", "reset_after"})
RETRY_AFTER_SECONDS = "1"
TRUNCATED_JSON = b'{"saga_id": "'


async def deliver(request: Request, call: PartnerCall[B], decider: Decider[B]) -> Response:
    """Decide and answer the call, or fail as the first matching fault rule says."""
    ledger: Ledger = request.state.ledger
    with ledger.transaction() as db:
        rule = faults.choose_rule(db, call.operation.name, call.body.model_dump(mode="json"))
    if rule is None:
        return _make_response(calls.decide_once(ledger, call, decider))
    connection: ClientConnection = request.state.connection
    if not rule.kind.startswith("timeout"):
        await connection.pause(rule.delay_seconds)
    if rule.kind in FAIL_BEFORE:
        calls.record_failure(ledger, call, rule.kind)
        return _make_fault_response(rule)
    decision = calls.decide_once(ledger, replace(call, refuse=rule.kind == "refuse"), decider)
    if rule.kind == "duplicate":
        # Decisions run one at a time, so concurrent deliveries would give the same result.
        calls.decide_once(ledger, call, decider)
    if rule.kind == "garbage":
        return Response(TRUNCATED_JSON, decision.status, media_type="application/json")
    return _make_fault_response(rule) if rule.kind in ANSWER_LOST else _make_response(decision)


def _make_response(decision: PartnerDecision) -> Response:
    if decision.silent:
        return NoAnswer(SILENCE_SECONDS, reset=False)
    media_type = MEDIA_TYPE if decision.status >= HTTPStatus.BAD_REQUEST else "application/json"
    return JSONResponse(dict(decision.body), decision.status, media_type=media_type)


def _make_fault_response(rule: Rule) -> Response:
    if rule.kind == "error":
        return respond(problem(500, "partner-error", "The partner failed and did nothing."))
    if rule.kind == "unavailable":
        body = problem(503, "partner-unavailable", "The partner is busy and did nothing.")
        return respond(body, {"Retry-After": RETRY_AFTER_SECONDS})
    if rule.kind.startswith("reset"):
        return NoAnswer(0, reset=True)
    return NoAnswer(rule.delay_seconds or SILENCE_SECONDS, reset=False)

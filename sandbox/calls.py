"""Decide each partner call once: the same idempotency key always gets the same decision and the same answer.

Decisions run one at a time: each is a synchronous transaction on one event loop, and SQLite's lock separates
processes. Concurrent calls with the same key therefore all get the answer of the first.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sandbox import ledger
from sandbox.ledger import EntryOutcome, Ledger
from sandbox.problems import ProblemError, problem

SagaId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~-]{1,64}$")]


class Body(BaseModel):
    """The field that all calls share: the saga. Unknown fields and loose types are invalid."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    saga_id: SagaId


class Line(BaseModel):
    """A quantity of one item."""

    model_config = Body.model_config

    item_id: Annotated[str, Field(min_length=1, max_length=200)]
    qty: Annotated[int, Field(gt=0, le=10**9)]


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class Operation:
    """A partner's do or undo, identified by the fixed ending of its idempotency key.

    `undone_by` is the key ending of the undo that blocks this do permanently. `refusal` is the agreed status
    and code if the partner refuses. An undo has neither.
    """

    name: str
    key_ending: str
    undone_by: str | None = None
    refusal: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class PartnerCall(Generic[B]):
    """A request whose key matches its body. `refuse` is set by a fault rule that makes the partner refuse."""

    operation: Operation
    body: B
    refuse: bool = False

    @classmethod
    def from_request(cls, operation: Operation, key: str | None, body: B) -> Self:
        """Return the call. Raise ProblemError (400) if the key is missing or belongs to another saga or step."""
        call = cls(operation, body)
        if key is None:
            raise ProblemError(400, "idempotency-key-missing", f"Idempotency-Key must be {call.key}")
        if key != call.key:
            raise ProblemError(400, "idempotency-key-invalid", f"Idempotency-Key must be {call.key}")
        return call

    @property
    def key(self) -> str:
        """The call's idempotency key: `{saga_id}:{step}` for a do, `{saga_id}:{step}:undo` for an undo."""
        return f"{self.body.saga_id}:{self.operation.key_ending}"


@dataclass(frozen=True, slots=True)
class PartnerDecision:
    """A partner's decision on one call.

    `remembered` is false if nothing is stored under the key, so a later call may be decided differently. `silent`
    means that the caller gets no answer.
    """

    outcome: EntryOutcome
    status: int
    body: Mapping[str, Any] = field(default_factory=dict)
    applied: bool = False
    amount_minor: int | None = None
    detail: str | None = None
    remembered: bool = True
    silent: bool = False


Decider = Callable[[sqlite3.Connection, PartnerCall[B]], PartnerDecision]
"""Decides a call whose key has no decision yet, inside the transaction that records the decision."""


def decide_once(ledger_file: Ledger, call: PartnerCall[B], decider: Decider[B]) -> PartnerDecision:
    """Return the earlier decision for this key, or make one; record it and commit before returning."""
    request = json.dumps(call.body.model_dump(mode="json"), sort_keys=True)
    with ledger_file.transaction() as db:
        decision = _find_earlier_decision(db, call, request) or decider(db, call)
        if decision.remembered:
            db.execute(
                "INSERT INTO answers (key, request, status, body) VALUES (?, ?, ?, ?)",
                (call.key, request, decision.status, json.dumps(decision.body)),
            )
        ledger.append(
            db,
            saga_id=call.body.saga_id,
            operation=call.operation.name,
            key=call.key,
            outcome=decision.outcome,
            applied=decision.applied,
            amount_minor=decision.amount_minor,
            detail=decision.detail,
        )
    return decision


def record_failure(ledger_file: Ledger, call: PartnerCall[B], detail: str) -> None:
    """Record a call that failed before the partner decided. Its key stays unused."""
    with ledger_file.transaction() as db:
        ledger.append(
            db,
            saga_id=call.body.saga_id,
            operation=call.operation.name,
            key=call.key,
            outcome="error",
            detail=detail,
        )


def refuse(operation: Operation) -> PartnerDecision:
    """Return a refusal with the status and code that the partner contract defines for this operation."""
    if operation.refusal is None:
        raise RuntimeError(f"bug: {operation.name} cannot be refused")
    status, code = operation.refusal
    return PartnerDecision("refused", status, problem(status, code, "The partner refused."), detail=code)


def _find_earlier_decision(db: sqlite3.Connection, call: PartnerCall[B], request: str) -> PartnerDecision | None:
    stored = _find_stored_answer(db, call.key)
    if stored is not None and stored["request"] != request:
        body = problem(422, "idempotency-key-reused", "This key was used before with another body.")
        return PartnerDecision("error", 422, body, detail=body["code"], remembered=False)
    # The undo's stored answer is the tombstone. Check it before the do's own answer: after the undo, a late
    # retry of the charge must not be answered "charged".
    if call.operation.undone_by is not None and _find_stored_answer(
        db, f"{call.body.saga_id}:{call.operation.undone_by}"
    ):
        return PartnerDecision(
            "undone", 409, problem(409, "undone", "An undo has blocked this operation permanently."), remembered=False
        )
    if stored is not None:
        return PartnerDecision("replayed", stored["status"], json.loads(stored["body"]), remembered=False)
    return None


def _find_stored_answer(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
    return row

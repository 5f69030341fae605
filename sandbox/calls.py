"""The key check that every partner call goes through: one key, one decision, one answer, for ever.

Decisions are made one at a time (a synchronous transaction on one event loop; between processes by SQLite's
lock), so calls with one key that arrive together share the first one's answer.
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
    """What every call says: which saga it is for. Unknown fields and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    saga_id: SagaId


class Line(BaseModel):
    """So many of one item."""

    model_config = Body.model_config

    item_id: Annotated[str, Field(min_length=1, max_length=200)]
    qty: Annotated[int, Field(gt=0, le=10**9)]


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing a partner does or undoes, known by the fixed ending of its key.

    `undone_by` is the key ending whose undo blocks this do for good, and `refusal` the status and code with
    which the partner may say no; an undo has neither.
    """

    name: str
    key_ending: str
    undone_by: str | None = None
    refusal: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class PartnerCall(Generic[B]):
    """A request whose key and body agree. `refuse` asks the partner to say no, as a fault rule wants it."""

    operation: Operation
    body: B
    refuse: bool = False

    @classmethod
    def checked(cls, operation: Operation, key: str | None, body: B) -> Self:
        """Take the request, or refuse it with 400 where its key is not that of this saga and step."""
        call = cls(operation, body)
        if key is None:
            raise ProblemError(400, "idempotency-key-missing", f"Idempotency-Key must be {call.key}")
        if key != call.key:
            raise ProblemError(400, "idempotency-key-invalid", f"Idempotency-Key must be {call.key}")
        return call

    @property
    def key(self) -> str:
        """`{saga_id}:{step}` of a do, `{saga_id}:{step}:undo` of an undo."""
        return f"{self.body.saga_id}:{self.operation.key_ending}"


@dataclass(frozen=True, slots=True)
class PartnerDecision:
    """A partner's decision. Not `remembered` under its key: a later call may end otherwise. `silent`: unheard."""

    outcome: EntryOutcome
    status: int
    body: Mapping[str, Any] = field(default_factory=dict)
    applied: bool = False
    amount_minor: int | None = None
    detail: str | None = None
    remembered: bool = True
    silent: bool = False


Decider = Callable[[sqlite3.Connection, PartnerCall[B]], PartnerDecision]
"""How one operation decides a call that is not decided yet, inside the transaction that will record it."""


def decide_once(ledger_file: Ledger, call: PartnerCall[B], decider: Decider[B]) -> PartnerDecision:
    """Decide the call, or repeat what was decided, and record it; all of it is durable when this returns."""
    request = json.dumps(call.body.model_dump(mode="json"), sort_keys=True)
    with ledger_file.transaction() as db:
        decision = _earlier_decision(db, call, request) or decider(db, call)
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
    """Record a call that arrived and came to nothing; its key stays free."""
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
    """The partner says no with the one status and code that are agreed for it."""
    if operation.refusal is None:
        raise RuntimeError(f"bug: {operation.name} cannot be refused")
    status, code = operation.refusal
    return PartnerDecision("refused", status, problem(status, code, "The partner refused."), detail=code)


def _earlier_decision(db: sqlite3.Connection, call: PartnerCall[B], request: str) -> PartnerDecision | None:
    stored = _stored_answer(db, call.key)
    if stored is not None and stored["request"] != request:
        body = problem(422, "idempotency-key-reused", "This key stands for a request with another body.")
        return PartnerDecision("error", 422, body, detail=body["code"], remembered=False)
    # The undo's remembered answer is the tombstone. It comes before the do's own answer: a late re-send must
    # not hear that its charge stands.
    if call.operation.undone_by is not None and _stored_answer(db, f"{call.body.saga_id}:{call.operation.undone_by}"):
        return PartnerDecision("undone", 409, problem(409, "undone", "This was undone for good."), remembered=False)
    if stored is not None:
        return PartnerDecision("replayed", stored["status"], json.loads(stored["body"]), remembered=False)
    return None


def _stored_answer(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
    return row

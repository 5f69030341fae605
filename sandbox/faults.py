"""Fault rules: which calls fail, how, and how often. The ledger file stores them, so they survive a restart.

The first rule that matches the call, has `times` left and passes its `probability` check applies. If the check
fails, the next rules are tried. Each use decrements `times`, so reading the rules shows how many uses remain.
"""

import random
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

FaultTarget = Literal[
    "inventory.hold",
    "inventory.commit",
    "inventory.release",
    "payment.charge",
    "payment.refund",
    "shipping.create",
    "shipping.cancel",
]
FaultKind = Literal[
    "refuse",
    "error",
    "unavailable",
    "slow",
    "timeout_before",
    "timeout_after",
    "reset_before",
    "reset_after",
    "garbage",
    "duplicate",
]
UNDO_TARGETS = frozenset({"inventory.release", "payment.refund", "shipping.cancel"})


class Rule(BaseModel):
    """A fault for the calls to `target` whose body contains every field of `match` with an equal value.

    `refuse`: the partner refuses with its agreed code. `error` (500), `unavailable` (503 with `Retry-After`),
    `timeout_before` and `reset_before`: the partner does nothing, and the key stays unused. `slow`: the partner
    acts after `delay_seconds`. `timeout_after`, `reset_after` and `garbage` (malformed JSON): the partner acts,
    but the caller cannot know. `duplicate`: the sandbox delivers the request twice, and the key check
    recognizes the second.

    A timeout keeps the connection open for `delay_seconds` (60 if that is 0), then closes it without an answer.
    Every other kind starts after `delay_seconds`. `times: null` means no limit.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    target: FaultTarget
    kind: FaultKind
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    times: Annotated[int | None, Field(ge=0)] = None
    delay_seconds: Annotated[float, Field(ge=0, le=3600)] = 0
    match: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _forbid_refusing_undos(self) -> Self:
        if self.kind == "refuse" and self.target in UNDO_TARGETS:
            raise ValueError(f"{self.target} is an undo, and an undo cannot be refused")
        return self

    def applies_to(self, target: str, body: Mapping[str, Any]) -> bool:
        """Return whether the rule matches the call and has uses left."""
        body_matches = all(name in body and body[name] == value for name, value in self.match.items())
        return self.target == target and self.times != 0 and body_matches


def choose_rule(db: sqlite3.Connection, target: str, body: Mapping[str, Any]) -> Rule | None:
    """Return the rule that applies to this call and decrement its `times`; None if no rule applies."""
    for row in db.execute("SELECT position, rule FROM faults ORDER BY position").fetchall():
        rule = Rule.model_validate_json(row["rule"])
        if rule.applies_to(target, body) and random.random() < rule.probability:  # noqa: S311 - a fault's probability, not a secret
            _count_down(db, row["position"], rule)
            return rule
    return None


def replace_rules(db: sqlite3.Connection, rules: Sequence[Rule]) -> None:
    """Replace all rules with these, in this order."""
    db.execute("DELETE FROM faults")
    db.executemany("INSERT INTO faults (rule) VALUES (?)", [(rule.model_dump_json(),) for rule in rules])


def load_rules(db: sqlite3.Connection) -> list[Rule]:
    """Return the rules in order, each with its remaining `times`."""
    rows = db.execute("SELECT rule FROM faults ORDER BY position")
    return [Rule.model_validate_json(row["rule"]) for row in rows]


def _count_down(db: sqlite3.Connection, position: int, rule: Rule) -> None:
    if rule.times is not None:
        updated = rule.model_copy(update={"times": rule.times - 1})
        db.execute("UPDATE faults SET rule = ? WHERE position = ?", (updated.model_dump_json(), position))

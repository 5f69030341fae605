"""Fault rules: which calls go wrong, how, how often. They are in the ledger file too and survive a restart.

The first rule of the list that fits the call, has `times` left and wins its draw applies; a rule that loses
its draw leaves the call to the rules after it. `times` counts down, so that reading the rules tells what is
left of them.
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
    """What goes wrong with the calls of one target whose body has the fields of `match`, each equal.

    `refuse`: the partner says no, with its agreed code. `error` (500), `unavailable` (503 with
    `Retry-After`), `timeout_before` and `reset_before`: not done, and the key stays free. `slow`: done after
    `delay_seconds`. `timeout_after`, `reset_after`, `garbage` (an unreadable answer): done, but the caller
    cannot know. `duplicate`: the request is delivered twice at once, through the key check.

    A timeout holds the connection open for `delay_seconds` (60 where that is 0), then closes it without an
    answer. Before every other kind, `delay_seconds` pass first. `times: null` is without end.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    target: FaultTarget
    kind: FaultKind
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    times: Annotated[int | None, Field(ge=0)] = None
    delay_seconds: Annotated[float, Field(ge=0, le=3600)] = 0
    match: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _only_a_do_is_refused(self) -> Self:
        if self.kind == "refuse" and self.target in UNDO_TARGETS:
            raise ValueError(f"an undo is never refused, and {self.target} is one")
        return self

    def applies_to(self, target: str, body: Mapping[str, Any]) -> bool:
        """Whether this rule is for such a call and is not used up."""
        body_matches = all(name in body and body[name] == value for name, value in self.match.items())
        return self.target == target and self.times != 0 and body_matches


def choose(db: sqlite3.Connection, target: str, body: Mapping[str, Any]) -> Rule | None:
    """The rule that applies to this call, one of its `times` spent; None where the call may go well."""
    for row in db.execute("SELECT position, rule FROM faults ORDER BY position").fetchall():
        rule = Rule.model_validate_json(row["rule"])
        if rule.applies_to(target, body) and random.random() < rule.probability:  # noqa: S311 - dice, not a secret
            _count_down(db, row["position"], rule)
            return rule
    return None


def replace(db: sqlite3.Connection, rules: Sequence[Rule]) -> None:
    """Let these rules, in this order, be the only ones."""
    db.execute("DELETE FROM faults")
    db.executemany("INSERT INTO faults (rule) VALUES (?)", [(rule.model_dump_json(),) for rule in rules])


def current(db: sqlite3.Connection) -> list[Rule]:
    """The rules in order, each with the `times` it has left."""
    rows = db.execute("SELECT rule FROM faults ORDER BY position")
    return [Rule.model_validate_json(row["rule"]) for row in rows]


def _count_down(db: sqlite3.Connection, position: int, rule: Rule) -> None:
    if rule.times is not None:
        updated = rule.model_copy(update={"times": rule.times - 1})
        db.execute("UPDATE faults SET rule = ? WHERE position = ?", (updated.model_dump_json(), position))

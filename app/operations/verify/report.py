"""The result of a pass: one row per invariant."""

from enum import StrEnum

from pydantic import BaseModel

from app.operations.verify.findings import Findings, Invariant, Suspicion

MAX_SHOWN = 100  # orders of one invariant in a report; the count is of all


class VerdictStatus(StrEnum):
    """The verdict on one invariant."""

    HOLDS = "holds"
    VIOLATED = "violated"
    NOT_CHECKED = "not checked"


class ViolationView(BaseModel):
    """One violation. `order_id`: the order, or an id that should be one; null if it is about something else."""

    order_id: str | None
    subject: str
    problem: str


class InvariantVerdict(BaseModel):
    """The verdict on one invariant. `examined`: how many orders. `violations`: of how many orders or other subjects."""

    invariant: Invariant
    title: str
    status: VerdictStatus
    examined: int
    violations: int
    orders: list[str]
    examples: list[ViolationView]
    detail: str


class VerifyReport(BaseModel):
    """One pass. `orders`: how many orders there were to examine."""

    checked_at: str
    took_seconds: float
    orders: int
    invariants: list[InvariantVerdict]

    @property
    def exit_code(self) -> int:
        """Return 1 if any invariant is violated, else 3 if any was not checked, else 0."""
        statuses = {verdict.status for verdict in self.invariants}
        if VerdictStatus.VIOLATED in statuses:
            return 1
        return 3 if VerdictStatus.NOT_CHECKED in statuses else 0


TITLES = {
    Invariant.I1: "a 201 means a durable order and event",
    Invariant.I2: "one order per key, one response",
    Invariant.I3: "published means confirmed by the broker",
    Invariant.I4: "every message and step takes effect once",
    Invariant.I5: "charged is what the order costs, or nothing",
    Invariant.I6: "nothing is past its age limit",
    Invariant.I7: "stock is conserved",
    Invariant.I8: "waiting and work are bounded",
    Invariant.I9: "rows of an order have its tenant",
}


def make_verdict(invariant: Invariant, findings: Findings, orders: int) -> InvariantVerdict:
    """Judge one invariant: a violation outweighs what could not be checked."""
    found = list(findings.of(invariant))
    examined, reasons = findings.examined[invariant], list(findings.obstacles.get(invariant, ()))
    if orders and not examined and not reasons:
        reasons.append("no order could be examined")
    status = VerdictStatus.VIOLATED if found else VerdictStatus.NOT_CHECKED if reasons else VerdictStatus.HOLDS
    views = [
        ViolationView(order_id=as_order_id(item.subject), subject=item.subject, problem=item.problem) for item in found
    ]
    detail = [*(f"not checked: {reason}" for reason in reasons), *findings.notes.get(invariant, ())]
    return InvariantVerdict(
        invariant=invariant,
        title=TITLES[invariant],
        status=status,
        examined=examined,
        violations=len(found) + findings.overflow[invariant],
        orders=list(dict.fromkeys(order for item in found for order in _orders_of(item)))[:MAX_SHOWN],
        examples=views[:MAX_SHOWN],
        detail="; ".join(detail),
    )


def _orders_of(suspicion: Suspicion) -> tuple[str, ...]:
    order_id = as_order_id(suspicion.subject)
    return suspicion.orders if order_id is None else (order_id,)


def as_order_id(subject: str) -> str | None:
    """Return a subject that looks like the id of an order; other subjects name a table row, a queue or an item."""
    return subject if ":" not in subject and " " not in subject else None

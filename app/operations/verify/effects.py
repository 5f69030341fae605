"""Judge effects: I4 (each message and step takes effect once, each order has at most one saga). Pure."""

from collections.abc import Iterator, Mapping
from datetime import datetime

from app.operations.verify.books import PartnerRecord
from app.operations.verify.findings import Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts
from app.orders.model import Status


def judge(order: OrderFacts, sagas_since: datetime, inbox_since: datetime) -> Iterator[Suspicion]:
    """Judge one order by its tables. Retention has removed no newer saga, and no newer inbox row, than these."""
    for problem in _saga_problems(order, sagas_since, inbox_since):
        yield Suspicion(Invariant.I4, str(order.id), problem, order.changed_at)


def judge_moves(order: OrderFacts, record: PartnerRecord) -> Iterator[Suspicion]:
    """Judge one order by what a ledger says that the partners did for it."""
    problems = [f"{operation} moved {number} times" for operation, number in _repeated(record.moves).items()]
    if order.never_started and (record.moves or record.state not in (None, "absent")):
        problems.append("it was cancelled before its saga started, and partners acted for it")
    for problem in problems:
        yield Suspicion(Invariant.I4, str(order.id), problem, order.changed_at)


def judge_stray(saga_id: str, record: PartnerRecord) -> Iterator[Suspicion]:
    """Judge what the partners have for an id of which there is no order."""
    if record.moves:
        yield Suspicion(Invariant.I4, saga_id, f"there is no such order, and partners did {', '.join(record.moves)}")
    if (balance := (record.charged_minor or 0) - (record.refunded_minor or 0)) != 0:
        problem = f"there is no such order, and charged - refunded is {balance} in minor units"
        yield Suspicion(Invariant.I5, saga_id, problem)
    if record.held or record.committed:
        yield Suspicion(Invariant.I7, saga_id, "there is no such order, and it has stock")


def _saga_problems(order: OrderFacts, sagas_since: datetime, inbox_since: datetime) -> Iterator[str]:
    if not order.has_saga:
        yield from _without_saga(order, sagas_since)
        return
    if order.never_started:
        yield "it was cancelled before its saga started, and has a saga"
    elif order.is_final != (order.finished_at is not None):
        yield f"it is {order.status}, and its saga has {'' if order.finished_at else 'not '}ended"
    if order.processed_at is None and order.started_at is not None and order.started_at > inbox_since:
        yield "it has a saga, and no inbox row says that its order.placed took effect"
    for step in order.repeated:
        yield f"the step {step} was recorded as done more than once"


def _without_saga(order: OrderFacts, sagas_since: datetime) -> Iterator[str]:
    if order.status is Status.PENDING and order.processed_at is not None:
        yield "its order.placed took effect, and it has no saga"
    elif order.status is Status.COMPENSATING:
        yield "it is compensating, and has no saga"
    elif order.is_final and not order.never_started and order.updated_at > sagas_since:
        yield f"it is {order.status}, and has no saga"


def _repeated(moves: Mapping[str, int]) -> dict[str, int]:
    return {operation: number for operation, number in moves.items() if number > 1}

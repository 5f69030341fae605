"""Judge a run by what its clients saw, the orders that the service has, and the partners' ledger.

Pure: everything that is needed was read before.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from load.history import Histories, percentile
from load.mix import Kind

FINAL = ("confirmed", "rejected", "cancelled")
ENOUGH = 0.95  # of the keys must end with a 201, or the run proves nothing
INITIAL_STOCK = 1_000_000  # the sandbox's, of a new item
INTERNAL_ERROR = "500"
NAMED = 20  # orders or keys named for one violation
SHARES = {"p50": 0.50, "p99": 0.99, "p99.9": 0.999}
NOTHING = {"charged_minor": 0, "refunded_minor": 0, "held": False, "committed": False, "shipped": False}
REASONS = {
    Kind.OUT_OF_STOCK: "out-of-stock",
    Kind.CARD_DECLINED: "card-declined",
    Kind.UNDELIVERABLE: "undeliverable",
}


@dataclass(frozen=True)
class Observed:
    """Everything that is judged. `orders`: of this run, by id. `ledger`: the sums of these orders, by id.

    `missing`: acknowledged orders that the listing did not show and that a read of the order did not find either.
    """

    keys: int
    seconds: float
    histories: Histories
    orders: Mapping[str, Mapping[str, Any]]
    missing: Sequence[str]
    ledger: Mapping[str, Mapping[str, Any]]
    stock: Mapping[str, Mapping[str, int]]
    stuck: Mapping[str, str]


@dataclass(frozen=True)
class Violation:
    """A broken promise. `names`: orders or keys that show it, at most NAMED of `count`."""

    promise: str
    count: int
    names: list[str]


@dataclass
class Verdict:
    """The result of a run. `outcome`: `not checked` if the run proves nothing, with the reason in `not_checked`."""

    outcome: Literal["holds", "violated", "not checked"]
    not_checked: str | None
    violations: list[Violation]
    keys: int
    requests: int
    acknowledged: int
    orders: int
    orders_per_second: float
    seconds: float
    outcomes: dict[str, int]
    statuses: dict[str, int]
    duplicates: int
    lost: int
    unfinished: int
    gave_up: int
    charged_minor: int
    refunded_minor: int
    due_minor: int
    acknowledged_seconds: dict[str, float | None]
    finished_seconds: dict[str, float | None]
    problems: list[str] = field(default_factory=list)


def judge(seen: Observed) -> Verdict:
    """Judge a run."""
    findings: dict[str, list[str]] = {promise: list(check(seen)) for promise, check in PROMISES.items()}
    violations = [Violation(promise, len(names), names[:NAMED]) for promise, names in findings.items() if names]
    histories = list(seen.histories.by_number.values())
    acknowledged = sum(history.is_acknowledged for history in histories)
    not_checked = None
    if acknowledged < ENOUGH * seen.keys or not seen.keys:
        not_checked = f"only {acknowledged} of {seen.keys} keys got a 201; below {ENOUGH:.0%} a run proves nothing"
    return Verdict(
        outcome="violated" if violations else "not checked" if not_checked else "holds",
        not_checked=not_checked,
        violations=violations,
        keys=seen.keys,
        requests=seen.histories.outcomes().total(),
        acknowledged=acknowledged,
        orders=len(seen.orders),
        orders_per_second=round(acknowledged / seen.seconds, 1) if seen.seconds else 0.0,
        seconds=round(seen.seconds, 3),
        outcomes=dict(sorted(seen.histories.outcomes().items())),
        statuses=dict(sorted(Counter(str(order["status"]) for order in seen.orders.values()).items())),
        duplicates=len(findings[ONE_ORDER]),
        lost=len(findings[NONE_LOST]),
        unfinished=len(findings[ALL_END]),
        gave_up=sum(history.gave_up for history in histories),
        charged_minor=sum(row["charged_minor"] for row in seen.ledger.values()),
        refunded_minor=sum(row["refunded_minor"] for row in seen.ledger.values()),
        due_minor=sum(due(seen, order) for order in seen.orders.values()),
        acknowledged_seconds=_percentiles(
            [history.acknowledged_seconds for history in histories if history.acknowledged_seconds is not None]
        ),
        finished_seconds=_percentiles([_lifetime(order) for order in seen.orders.values() if is_final(order)]),
        problems=sorted({history.problem for history in histories if history.problem})[:3],
    )


def is_final(order: Mapping[str, Any]) -> bool:
    """Return whether the order has ended."""
    return order["status"] in FINAL


def due(seen: Observed, order: Mapping[str, Any]) -> int:
    """Return what the customer must have paid, by the request that was sent and not by the service's answer."""
    planned = seen.histories.by_number[number_of(order)].order
    return planned.total_minor if order["status"] == "confirmed" else 0


def number_of(order: Mapping[str, Any]) -> int:
    """Return the number of the key that an order belongs to."""
    return int(str(order["customer_id"]).rpartition("-")[2])


def _lifetime(order: Mapping[str, Any]) -> float:
    placed, updated = (datetime.fromisoformat(order[name]) for name in ("placed_at", "updated_at"))
    return (updated - placed).total_seconds()


def _percentiles(values: list[float]) -> dict[str, float | None]:
    values.sort()
    return {name: percentile(values, share) for name, share in SHARES.items()}


def _lost(seen: Observed) -> Iterator[str]:
    yield from seen.missing


def _duplicates(seen: Observed) -> Iterator[str]:
    orders = Counter(number_of(order) for order in seen.orders.values())
    for number, history in seen.histories.by_number.items():
        if orders[number] > 1 or len(history.order_ids) > 1:
            yield history.order.key


def _replays(seen: Observed) -> Iterator[str]:
    for history in seen.histories.by_number.values():
        if len(history.responses) > 1:
            yield history.order.key


def _unfinished(seen: Observed) -> Iterator[str]:
    for id_, order in seen.orders.items():
        if not is_final(order):
            yield f"{id_} ({order['status']}{'; ' + seen.stuck[id_] if id_ in seen.stuck else ''})"


def _errors(seen: Observed) -> Iterator[str]:
    for history in seen.histories.by_number.values():
        if history.outcomes[INTERNAL_ERROR]:
            yield history.order.key


def _charges(seen: Observed) -> Iterator[str]:
    for id_, order in seen.orders.items():
        row = seen.ledger.get(id_, NOTHING)
        balance = row["charged_minor"] - row["refunded_minor"]
        if is_final(order) and balance != due(seen, order):
            yield f"{id_} ({order['status']}; {balance} instead of {due(seen, order)})"


def _parcels(seen: Observed) -> Iterator[str]:
    for id_, order in seen.orders.items():
        row = seen.ledger.get(id_, NOTHING)
        ships = order["status"] == "confirmed"
        if is_final(order) and (row["held"], row["committed"], row["shipped"]) != (False, ships, ships):
            yield f"{id_} ({order['status']})"


def _refusals(seen: Observed) -> Iterator[str]:
    """Yield orders that ended as confirmed though a partner refuses them, or were refused for a reason not theirs."""
    for id_, order in seen.orders.items():
        kind = seen.histories.by_number[number_of(order)].order.kind
        refused = REASONS.get(kind)
        reason = order["status_reason"]
        if (order["status"] == "confirmed" and refused) or (reason in REASONS.values() and reason != refused):
            yield f"{id_} ({kind}: {order['status']}, {reason})"


def _stock(seen: Observed) -> Iterator[str]:
    sold: Counter[str] = Counter()
    for order in seen.orders.values():
        planned = seen.histories.by_number[number_of(order)].order
        sold[planned.sku] += planned.quantity if order["status"] == "confirmed" else 0
    if all(is_final(order) for order in seen.orders.values()):
        for item, stock in seen.stock.items():
            if stock != {"free": INITIAL_STOCK - sold[item], "held": 0, "sold": sold[item]}:
                yield f"{item} ({dict(stock)} with {sold[item]} in confirmed orders)"


NONE_LOST = "every acknowledged order exists"
ONE_ORDER = "one key makes one order"
ALL_END = "every order ends"
NO_500 = "a failure is an honest 4xx or 503, never a 500"
PROMISES = {
    NONE_LOST: _lost,
    ONE_ORDER: _duplicates,
    "every 201 of a key is the same, byte for byte": _replays,
    ALL_END: _unfinished,
    NO_500: _errors,
    "charged - refunded is the total if confirmed, else zero": _charges,
    "stock is sold and shipped if confirmed, else neither": _parcels,
    "an order ends as its partners decided": _refusals,
    "stock is conserved": _stock,
}

"""The verdict of a load run: each promise is judged, and a broken one is named."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest

from load.history import Histories, percentile
from load.mix import BEHAVIOURS, KINDS, Kind, OrderMix
from load.report import as_text
from load.verdict import INITIAL_STOCK, PROMISES, Observed, Verdict, due, judge

MIX = OrderMix("r1", seed=1)
KEYS = 200
ENDS = {
    Kind.OUT_OF_STOCK: ("rejected", "out-of-stock"),
    Kind.CARD_DECLINED: ("rejected", "card-declined"),
    Kind.UNDELIVERABLE: ("rejected", "undeliverable"),
}
CHARGED_BEFORE_REFUSAL = {Kind.UNDELIVERABLE}


def a_clean_run() -> Observed:
    """Return what a correct service, and correct partners, leave behind."""
    histories, orders, ledger = Histories(), {}, {}
    stock = {item: {"free": INITIAL_STOCK, "held": 0, "sold": 0} for item in MIX.items()}
    for number in range(KEYS):
        planned, id_ = MIX.order(number), f"order-{number}"
        history = histories.start(planned, due_at=time.monotonic())
        history.add(201, f"/orders/{id_}", b"{}")
        status, reason = ENDS.get(planned.kind, ("confirmed", None))
        orders[id_] = {
            "customer_id": planned.customer,
            "status": status,
            "status_reason": reason,
            "placed_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:01Z",
        }
        sold = status == "confirmed"
        charged = planned.total_minor if sold or planned.kind in CHARGED_BEFORE_REFUSAL else 0
        refunded = 0 if sold else charged
        ledger[id_] = {
            "charged_minor": charged,
            "refunded_minor": refunded,
            "held": False,
            "committed": sold,
            "shipped": sold,
        }
        if sold:
            stock[planned.sku]["free"] -= planned.quantity
            stock[planned.sku]["sold"] += planned.quantity
    return Observed(KEYS, 1.0, histories, orders, [], ledger, stock, {})


def find(seen: Observed, kind: Kind) -> str:
    """Return the id of an order of this kind."""
    return next(id_ for id_ in seen.orders if seen.histories.by_number[int(id_[6:])].order.kind is kind)


def test_a_late_201_counts_from_when_its_key_was_due() -> None:
    """A key that got its 201 only from the retries at the end shows how long its client waited."""
    seen = a_clean_run()
    patient = [history for history in seen.histories.by_number.values() if history.acknowledged_seconds is not None]
    assert len(patient) < KEYS, "clients that hang up are no measure"
    patient[0].due_at -= 60
    assert 60 <= (judge(seen).acknowledged_seconds["p99.9"] or 0) < 120


def test_a_clean_run_holds() -> None:
    """No promise is violated, and the figures add up."""
    verdict = judge(a_clean_run())
    assert (verdict.outcome, verdict.violations, verdict.not_checked) == ("holds", [], None)
    assert verdict.charged_minor - verdict.refunded_minor == verdict.due_minor > 0
    assert verdict.acknowledged == verdict.orders == KEYS
    assert verdict.finished_seconds["p50"] == 1.0
    assert "HOLDS" in as_text(verdict)


def _lose(seen: Observed, id_: str) -> None:
    seen.missing.append(id_)  # type: ignore[attr-defined] # a list


def _duplicate(seen: Observed, id_: str) -> None:
    seen.orders["other"] = seen.orders[id_]  # type: ignore[index] # a dict
    seen.ledger["other"] = seen.ledger[id_]  # type: ignore[index] # a dict


def _answer_differently(seen: Observed, id_: str) -> None:
    seen.histories.by_number[int(id_[6:])].add(201, f"/orders/{id_}", b"{ }")


def _leave_pending(seen: Observed, id_: str) -> None:
    seen.orders[id_]["status"] = "pending"  # type: ignore[index] # a dict


def _fail(seen: Observed, id_: str) -> None:
    seen.histories.by_number[int(id_[6:])].add(500, "", b"{}")


def _charge_twice(seen: Observed, id_: str) -> None:
    seen.ledger[id_]["charged_minor"] *= 2  # type: ignore[index] # a dict


def _ship_nothing(seen: Observed, id_: str) -> None:
    seen.ledger[id_]["shipped"] = False  # type: ignore[index] # a dict


def _confirm_refused(seen: Observed, _: str) -> None:
    seen.orders[find(seen, Kind.CARD_DECLINED)]["status"] = "confirmed"  # type: ignore[index] # a dict


def _leak_stock(seen: Observed, _: str) -> None:
    seen.stock[MIX.items()[0]]["free"] -= 1  # type: ignore[index] # a dict


DAMAGE: list[tuple[Callable[[Observed, str], None], str]] = [
    (_lose, "every acknowledged order exists"),
    (_duplicate, "one key makes one order"),
    (_answer_differently, "every 201 of a key is the same, byte for byte"),
    (_leave_pending, "every order ends"),
    (_fail, "a failure is an honest 4xx or 503, never a 500"),
    (_charge_twice, "charged - refunded is the total if confirmed, else zero"),
    (_ship_nothing, "stock is sold and shipped if confirmed, else neither"),
    (_confirm_refused, "an order ends as its partners decided"),
    (_leak_stock, "stock is conserved"),
]


def test_each_promise_has_a_damage() -> None:
    """No promise is left without a test that breaks it."""
    assert [promise for _, promise in DAMAGE] == list(PROMISES)


@pytest.mark.parametrize(("damage", "promise"), DAMAGE)
def test_damage_is_named(damage: Callable[[Observed, str], None], promise: str) -> None:
    """The verdict names the promise that was broken, and one order or key that shows it."""
    seen = a_clean_run()
    damage(seen, find(seen, Kind.PLAIN))
    verdict = judge(seen)
    found = {violation.promise: violation for violation in verdict.violations}
    assert verdict.outcome == "violated"
    assert found[promise].count == len(found[promise].names) == 1
    assert f"VIOLATED: {promise}: 1" in as_text(verdict)


def test_few_acknowledged_keys_prove_nothing() -> None:
    """Below 95 % of keys with a 201 the verdict is `not checked`, with a response that explains it."""
    seen = dataclasses.replace(a_clean_run(), keys=KEYS * 2)
    seen.histories.by_number[0].add(503, "", b'{"code":"outbox-full"}')
    verdict: Verdict = judge(seen)
    assert verdict.outcome == "not checked"
    assert "200 of 400" in str(verdict.not_checked)
    assert verdict.problems == ['{"code":"outbox-full"}']


def test_an_expired_order_may_be_rejected_whatever_its_kind() -> None:
    """A partner that is down until the deadline is no violation: the order is rejected, and everything is undone."""
    seen = a_clean_run()
    id_ = find(seen, Kind.PLAIN)
    planned = seen.histories.by_number[int(id_[6:])].order
    order: Any = seen.orders[id_]
    order.update(status="rejected", status_reason="timed-out")
    row: Any = seen.ledger[id_]
    row.update(refunded_minor=planned.total_minor, committed=False, shipped=False)
    stock: Any = seen.stock[planned.sku]
    stock.update(free=stock["free"] + planned.quantity, sold=stock["sold"] - planned.quantity)
    assert due(seen, order) == 0
    assert judge(seen).violations == []


def test_the_mix_follows_from_the_seed() -> None:
    """One seed gives one list of orders; every kind and behaviour occurs in a thousand of them."""
    orders = [MIX.order(number) for number in range(1000)]
    assert orders == [OrderMix("r1", 1).order(number) for number in range(1000)]
    assert {order.kind for order in orders} == set(KINDS)
    assert {order.behaviour for order in orders} == set(BEHAVIOURS)
    assert [order.quantity for order in orders] != [OrderMix("r1", 2).order(n).quantity for n in range(1000)]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (0.001, 1)])
def test_percentiles_use_the_nearest_rank(share: float, expected: float) -> None:
    """A percentile is one of the values."""
    assert percentile([float(number) for number in range(1, 101)], share) == expected
    assert percentile([], share) is None

"""The janitor verifies recent orders, and its metrics show violations and what it has never checked."""

from typing import Any

from app.bootstrap import metrics
from app.observability.signals import Signals
from app.operations.verify.findings import Invariant
from tests.harness.verifying import Verified

HOLDS = {invariant.value: (0.0, True) for invariant in Invariant}
NEVER_CHECKED = {invariant.value: (0.0, False) for invariant in Invariant}
NO_PARTNERS: dict[str, Any] = {"inventory_url": "", "payment_url": "", "shipping_url": ""}


async def test_healthy_orders_are_checked(system: Verified) -> None:
    """After a pass, every invariant has a time of its check, and no violation."""
    signals = Signals()
    registry = metrics.install(signals)
    await system.place("one")
    assert await system.verify_recent(system.janitor(signals), registry) == HOLDS


async def test_violation_is_reported_until_it_is_gone(system: Verified) -> None:
    """A later pass examines newer orders, and judges the wrong order again."""
    signals = Signals()
    registry = metrics.install(signals)
    await system.place("one")
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1 WHERE id = $1", order)
    janitor = system.janitor(signals)
    wrong = HOLDS | {"I1": (1.0, True), "I5": (1.0, True)}
    assert await system.verify_recent(janitor, registry) == wrong
    await system.place("two")
    assert await system.verify_recent(janitor, registry) == wrong
    await system.pool.execute("UPDATE orders SET total_minor = total_minor - 1 WHERE id = $1", order)
    assert await system.verify_recent(janitor, registry) == HOLDS


async def test_unfinished_order_is_judged_later(system: Verified) -> None:
    """An order that has not ended when the pass comes by is judged once it has."""
    signals = Signals()
    registry = metrics.install(signals)
    await system.place("one")
    order = system.orders["one"]
    status = "UPDATE orders SET status = $2 WHERE id = $1"
    await system.pool.execute(status, order, "compensating")
    await system.pool.execute("UPDATE sagas SET finished_at = NULL WHERE id = $1", order)
    janitor = system.janitor(signals)
    shown = await system.verify_recent(janitor, registry)
    assert (shown["I1"], shown["I5"]) == ((0.0, True), (0.0, False))  # money is judged of orders that have ended
    await system.pool.execute(status, order, "rejected")
    assert (await system.verify_recent(janitor, registry))["I5"] == (1.0, True)


async def test_without_partners_money_is_never_checked(system: Verified) -> None:
    """Zero violations of what needs a partner do not look as if they had been checked."""
    signals = Signals()
    registry = metrics.install(signals)
    await system.place("one")
    shown = await system.verify_recent(system.janitor(signals, **NO_PARTNERS), registry)
    assert shown == HOLDS | {name: NEVER_CHECKED[name] for name in ("I4", "I5", "I7")}


async def test_new_keys_are_judged(system: Verified) -> None:
    """A key that names another order is found by the next pass, and stays visible until it is gone."""
    signals = Signals()
    registry = metrics.install(signals)
    await system.place("one")
    janitor = system.janitor(signals)
    assert await system.verify_recent(janitor, registry) == HOLDS
    await system.place("two")
    rename = "UPDATE idempotency_keys SET location = '/orders/' || $1::text WHERE key = 'two'"
    await system.pool.execute(rename, str(system.orders["one"]))
    for _ in range(2):
        assert (await system.verify_recent(janitor, registry))["I2"] == (1.0, True)
    await system.pool.execute(rename, str(system.orders["two"]))
    assert await system.verify_recent(janitor, registry) == HOLDS


async def test_unfinished_orders_hide_no_violation(system: Verified) -> None:
    """A violation stays visible while more older orders are unfinished than one pass judges again."""
    signals = Signals()
    registry = metrics.install(signals)
    *_, wrong = [await system.place_silently() for _ in range(4)]
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1 WHERE id = $1", wrong)
    janitor = system.janitor(signals, max_again=2)
    for _ in range(3):
        assert (await system.verify_recent(janitor, registry))["I1"] == (1.0, True)

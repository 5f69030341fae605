"""What a pass examines, what it leaves out and says so, and that it never reports a healthy system."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.db import Pool
from app.operations.verify.run import Scope
from tests.harness.ports import free_port
from tests.harness.stripe_fake import API_KEY, StripeFake
from tests.harness.verifying import ALL_ORDERS, Verified, problems, statuses, system_to_verify, verdict_on

ALL = [f"I{number}" for number in range(1, 10)]
PARTNERS = dict.fromkeys(("I4", "I5", "I7"), "not checked")
BROKER = dict.fromkeys(("I3", "I6"), "not checked")
UNDELIVERABLE: dict[str, Any] = {"items": [{"sku": "UNDELIVERABLE", "quantity": 1, "unit_price": "9.99"}]}


@pytest.fixture
async def without_ledger(database_url: str, pool: Pool, tmp_path: Path) -> AsyncIterator[Verified]:
    """A system whose partners answer only query calls."""
    async with system_to_verify(database_url, pool, tmp_path, hides_ledger=True) as system:
        yield system


async def test_healthy_system_holds(system: Verified) -> None:
    """Confirmed and rejected orders of a healthy system satisfy every invariant, and each was examined."""
    await system.place("one", "two")
    await system.place("refused", **UNDELIVERABLE)
    report = await system.verify()
    assert not statuses(report), list(problems(report))
    assert report.exit_code == 0
    assert {row.invariant.value: row.examined for row in report.invariants} == dict.fromkeys(ALL, 3)


async def test_empty_system_holds(system: Verified) -> None:
    """Without any order there is nothing that could be wrong."""
    report = await system.verify()
    assert (report.exit_code, report.orders) == (0, 0), list(problems(report))


@pytest.mark.parametrize("page_size", [1, 2])
async def test_pages_leave_nothing_out(system: Verified, page_size: int) -> None:
    """With pages of any size, each order, key, item and stray charge is examined once."""
    await system.place("one", "two", "three", "four", "five")
    assert not statuses(await system.verify(page_size=page_size))
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1")
    system.write_ledger("UPDATE stock SET free = free - 1")
    strays = [UUID(int=1), UUID(int=system.orders["three"].int + 1), UUID(int=2**128 - 1)]
    for stray in strays:
        body = {"saga_id": str(stray), "amount_minor": 700, "currency": "USD"}
        await system.call("/v1/payments/charge", f"{stray}:charge_payment", body)
    report = await system.verify(page_size=page_size)
    assert {row.invariant.value: row.examined for row in report.invariants} == dict.fromkeys(ALL, 5)
    assert sorted(verdict_on(report, "I1").orders) == sorted(str(order) for order in system.orders.values())
    assert {str(stray) for stray in strays} <= set(verdict_on(report, "I5").orders)
    assert verdict_on(report, "I7").violations == 1


async def test_scope_selects_recent_orders(system: Verified) -> None:
    """With a limit of age, older orders are not examined."""
    await system.place("one")
    assert (await system.verify(Scope(since_seconds=3600))).orders == 1
    assert (await system.verify(Scope(since_seconds=0.001))).orders == 0


async def test_suspect_that_is_fine_again_is_not_reported(system: Verified) -> None:
    """What looked wrong while its page was read, and is right afterwards, was in progress."""
    await system.place("one")
    edit = """UPDATE holds SET items = '{"WIDGET": %d}'"""
    system.write_ledger(edit % 2)
    looks: list[int] = []

    def correct(done: int, _: int) -> None:
        looks.append(done)
        system.write_ledger(edit % (3 if done else 2))

    async with system.verifier() as verifier:
        done = await verifier.run(ALL_ORDERS, correct)
    assert looks == [0, 1]
    assert [suspicion.invariant for suspicion in done.first.suspects.values()] == ["I7"]
    assert not statuses(done.report()), list(problems(done.report()))


async def test_partners_down_are_not_checked(system: Verified) -> None:
    """What needs the partners is not checked, the rest holds, and nothing hangs."""
    await system.place("one")
    dead = f"http://127.0.0.1:{free_port()}"
    report = await system.verify(inventory_url=dead, payment_url=dead, shipping_url=dead)
    assert statuses(report) == PARTNERS
    assert report.exit_code == 3
    assert "payment" in verdict_on(report, "I5").detail


async def test_one_partner_down_leaves_the_others(system: Verified) -> None:
    """The invariants of the other partners are still checked."""
    await system.place("one")
    report = await system.verify(payment_url=f"http://127.0.0.1:{free_port()}")
    assert statuses(report) == {"I4": "not checked", "I5": "not checked"}


async def test_partners_without_url_are_not_checked(system: Verified) -> None:
    """The reason names the variable that is not set."""
    await system.place("one")
    report = await system.verify(inventory_url="", payment_url="", shipping_url="")
    assert statuses(report) == PARTNERS
    assert "ORDERS_PAYMENT_URL is not set" in verdict_on(report, "I5").detail


async def test_broker_down_is_not_checked(system: Verified) -> None:
    """What needs the broker is not checked, and the events that wait for it are no violation."""
    await system.place("one")
    await system.place_silently(86_400)
    report = await system.verify(rabbitmq_url=f"amqp://127.0.0.1:{free_port()}")
    assert statuses(report) == BROKER
    assert report.exit_code == 3


async def test_other_transport_is_not_checked(system: Verified) -> None:
    """A pass that does not know the broker of the service does not judge by an empty one."""
    await system.place("one")
    await system.pool.execute(
        """
        INSERT INTO transport_leases (id, transport, holder, expires_at)
        VALUES (gen_random_uuid(), 'rabbitmq', 'elsewhere', clock_timestamp() + interval '1 hour')
        """
    )
    report = await system.verify()
    assert statuses(report) == BROKER
    assert "rabbitmq" in verdict_on(report, "I3").detail


async def test_violation_outweighs_what_was_not_checked(system: Verified) -> None:
    """The exit code is 1 even if something else could not be checked."""
    await system.place("one")
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1")
    report = await system.verify(inventory_url="", payment_url="", shipping_url="")
    assert statuses(report) == {**PARTNERS, "I1": "violated"}
    assert report.exit_code == 1


async def test_unfinished_orders_are_not_judged_by_partners(system: Verified) -> None:
    """If no order has ended, none was examined by the partners' side: that is not checked, and no violation."""
    await system.place_silently()
    report = await system.verify()
    assert statuses(report) == {"I5": "not checked", "I7": "not checked"}
    assert verdict_on(report, "I5").examined == 0


async def test_pruned_rows_are_no_violation(system: Verified) -> None:
    """Rows past their retention may be gone; their orders are examined by what is left."""
    await system.place("old", "new")
    old = system.orders["old"]
    await system.pool.execute(
        "UPDATE orders SET placed_at = placed_at - interval '100 days', updated_at = updated_at - interval '100 days'"
        " WHERE id = $1",
        old,
    )
    await system.pool.execute("DELETE FROM idempotency_keys")
    await system.pool.execute("DELETE FROM outbox WHERE subject = $1", str(old))
    await system.pool.execute("DELETE FROM inbox WHERE message_id = $1", str(old))
    await system.pool.execute("DELETE FROM saga_steps WHERE saga_id = $1", old)
    await system.pool.execute("DELETE FROM sagas WHERE id = $1", old)
    report = await system.verify()
    assert not statuses(report), list(problems(report))
    assert (verdict_on(report, "I3").examined, verdict_on(report, "I5").examined) == (1, 2)


async def test_queries_judge_partners_without_a_ledger(without_ledger: Verified) -> None:
    """Their states satisfy the invariants of a healthy system, and the report says what they do not show."""
    await without_ledger.place("one")
    await without_ledger.place("refused", **UNDELIVERABLE)
    report = await without_ledger.verify()
    assert not statuses(report), list(problems(report))
    assert verdict_on(report, "I5").examined == 2
    assert "payment has no ledger" in verdict_on(report, "I5").detail


async def test_queries_find_a_refund_and_a_release(without_ledger: Verified) -> None:
    """The states of a confirmed order that was refunded and released behind its back are violations."""
    await without_ledger.place("one")
    order = str(without_ledger.orders["one"])
    await without_ledger.call("/v1/payments/refund", f"{order}:charge_payment:undo", {"saga_id": order})
    await without_ledger.call("/v1/inventory/release", f"{order}:reserve_inventory:undo", {"saga_id": order})
    report = await without_ledger.verify()
    assert statuses(report) == {"I5": "violated", "I7": "violated"}
    assert verdict_on(report, "I5").orders == verdict_on(report, "I7").orders == [order]


async def test_stripe_is_asked_for_each_payment(system: Verified, stripe: StripeFake) -> None:
    """Paid and declined orders hold; a refund behind the service's back is found. Nothing is created."""
    settings: dict[str, Any] = {"payment_provider": "stripe", "payment_url": stripe.url, "stripe_api_key": API_KEY}
    await system.place("paid", settings=settings, payment_method="pm_card_visa")
    await system.place("declined", settings=settings, payment_method="pm_card_visa_chargeDeclined")
    stripe.index()
    before = len(stripe.intents)
    report = await system.verify(**settings)
    assert not statuses(report), list(problems(report))
    assert verdict_on(report, "I5").examined == 2
    intent = next(key for key, value in stripe.intents.items() if value["status"] == "succeeded")
    stripe.refunds.append({"id": "re_1", "payment_intent": intent, "status": "succeeded", "amount": 2997})
    report = await system.verify(**settings)
    assert statuses(report) == {"I5": "violated"}
    assert verdict_on(report, "I5").orders == [str(system.orders["paid"])]
    assert len(stripe.intents) == before

"""Planted damage: each kind makes a pass end with exit code 1, and name the order and the right invariant."""

from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import pytest

from tests.harness.verifying import Verified, problems, verdict_on

DAY_SECONDS = 86_400.0
APPLIED = "INSERT INTO ledger (at, saga_id, operation, key, outcome, applied) VALUES ('', ?, ?, NULL, 'done', 1)"


async def stray_charge(system: Verified) -> UUID:
    stray = uuid4()
    body = {"saga_id": str(stray), "amount_minor": 700, "currency": "USD"}
    await system.call("/v1/payments/charge", f"{stray}:charge_payment", body)
    return stray


async def refund_of_a_confirmed_order(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.call("/v1/payments/refund", f"{order}:charge_payment:undo", {"saga_id": str(order)})
    return order


async def deleted_outbox_row(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("DELETE FROM outbox WHERE id = $1", order)
    return order


async def deleted_last_event(system: Verified) -> UUID:
    order = system.orders["two"]
    await system.pool.execute("DELETE FROM outbox WHERE subject = $1 AND id::text <> subject", str(order))
    return order


async def stock_released_behind_an_order(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.call("/v1/inventory/release", f"{order}:reserve_inventory:undo", {"saga_id": str(order)})
    return order


async def edited_hold(system: Verified) -> UUID:
    order = system.orders["one"]
    system.write_ledger("""UPDATE holds SET items = '{"WIDGET": 2}' WHERE saga_id = ?""", str(order))
    return order


async def doubled_shipment(system: Verified) -> UUID:
    order = system.orders["one"]
    system.write_ledger(APPLIED, str(order), "shipping.create")
    return order


async def order_whose_saga_is_gone(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("DELETE FROM saga_steps WHERE saga_id = $1", order)
    await system.pool.execute("DELETE FROM sagas WHERE id = $1", order)
    return order


async def second_effect(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute(
        """
        INSERT INTO saga_steps (saga_id, step, action, attempt, outcome)
        SELECT saga_id, step, action, attempt, outcome FROM saga_steps
        WHERE saga_id = $1 AND step = 'charge_payment' AND outcome = 'done'
        """,
        order,
    )
    return order


async def second_event(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute(
        """
        INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, published_at)
        SELECT $2, type, subject, sequence, tenant, data, occurred_at, published_at FROM outbox WHERE id = $1
        """,
        order,
        uuid4(),
    )
    return order


async def saga_of_an_order_that_never_started(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET status = 'cancelled', version = 2 WHERE id = $1", order)
    return order


async def event_that_was_never_sent(system: Verified) -> UUID:
    return await system.place_silently(DAY_SECONDS, published=True)


async def key_of_another_order(system: Verified) -> UUID:
    await system.pool.execute(
        "UPDATE idempotency_keys SET location = '/orders/' || $1::text WHERE key = 'two'", str(system.orders["one"])
    )
    return system.orders["one"]


async def key_with_the_response_of_another(system: Verified) -> UUID:
    await system.pool.execute(
        """
        UPDATE idempotency_keys AS k SET location = other.location, body = other.body
        FROM idempotency_keys AS other WHERE k.key = 'two' AND other.key = 'one'
        """
    )
    return system.orders["one"]


async def key_of_no_order(system: Verified) -> UUID:
    lost = uuid4()
    await system.pool.execute("UPDATE idempotency_keys SET location = '/orders/' || $1::text", str(lost))
    return lost


async def overdue_saga(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET status = 'pending', version = 1 WHERE id = $1", order)
    await system.pool.execute(
        """
        UPDATE sagas SET finished_at = NULL, next_attempt_at = clock_timestamp() - interval '61 s' WHERE id = $1
        """,
        order,
    )
    return order


async def saga_that_needs_an_operator(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET status = 'pending', version = 1 WHERE id = $1", order)
    await system.pool.execute(
        "UPDATE sagas SET finished_at = NULL, needs_operator_at = clock_timestamp() WHERE id = $1", order
    )
    return order


async def parked_event(system: Verified) -> UUID:
    order = await system.place_silently()
    await system.pool.execute("UPDATE outbox SET parked_at = pending_since, last_error = 'nack' WHERE id = $1", order)
    return order


async def dead_letter(system: Verified) -> UUID:
    order = await system.place_silently(published=True)
    await system.pool.execute(
        "INSERT INTO inbox (consumer, message_id, attempts, dead_at) VALUES ('saga', $1, 7, clock_timestamp())",
        str(order),
    )
    return order


async def overdue_event(system: Verified) -> UUID:
    return await system.place_silently(DAY_SECONDS)


async def edited_total(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1 WHERE id = $1", order)
    return order


async def confirmed_after_its_cancel(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE orders SET cancel_requested_at = clock_timestamp() WHERE id = $1", order)
    return order


async def event_of_another_tenant(system: Verified) -> UUID:
    order = system.orders["one"]
    await system.pool.execute("UPDATE outbox SET tenant = 'other' WHERE id = $1", order)
    return order


async def key_of_another_tenant(system: Verified) -> UUID:
    await system.pool.execute("UPDATE idempotency_keys SET tenant = 'other' WHERE key = 'one'")
    return system.orders["one"]


async def saga_that_waits_for_ever(system: Verified) -> UUID:
    order = await system.place_silently()
    await system.pool.execute(
        "UPDATE outbox SET next_attempt_at = clock_timestamp() + interval '1 year' WHERE id = $1", order
    )
    return order


DAMAGE: list[tuple[str, Callable[[Verified], Awaitable[UUID]]]] = [
    ("I5", stray_charge),
    ("I5", refund_of_a_confirmed_order),
    ("I1", deleted_outbox_row),
    ("I1", deleted_last_event),
    ("I7", stock_released_behind_an_order),
    ("I7", edited_hold),
    ("I4", doubled_shipment),
    ("I4", order_whose_saga_is_gone),
    ("I4", second_effect),
    ("I4", second_event),
    ("I4", saga_of_an_order_that_never_started),
    ("I3", event_that_was_never_sent),
    ("I2", key_of_another_order),
    ("I2", key_with_the_response_of_another),
    ("I1", key_of_no_order),
    ("I6", overdue_saga),
    ("I6", saga_that_needs_an_operator),
    ("I6", parked_event),
    ("I6", dead_letter),
    ("I6", overdue_event),
    ("I1", edited_total),
    ("I5", confirmed_after_its_cancel),
    ("I9", event_of_another_tenant),
    ("I9", key_of_another_tenant),
    ("I8", saga_that_waits_for_ever),
]


@pytest.mark.parametrize(("invariant", "damage"), DAMAGE, ids=[damage.__name__ for _, damage in DAMAGE])
async def test_damage_is_found(system: Verified, invariant: str, damage: Callable[[Verified], Awaitable[UUID]]) -> None:
    """The invariant is violated, and the damaged order is named."""
    await system.place("one", "two")
    order = await damage(system)
    report = await system.verify()
    row = verdict_on(report, invariant)
    assert row.status.value == "violated", list(problems(report))
    assert row.orders == [str(order)]
    assert report.exit_code == 1


async def test_edited_stock_is_found(system: Verified) -> None:
    """Stock that no entry of the ledger explains is a violation, and its item and orders are named."""
    await system.place("one", "two")
    system.write_ledger("UPDATE stock SET free = free - 1 WHERE item_id = 'WIDGET'")
    report = await system.verify()
    row = verdict_on(report, "I7")
    assert row.status.value == "violated"
    assert "item: WIDGET" in row.examples[0].subject
    assert sorted(row.orders) == sorted(str(order) for order in system.orders.values())
    assert report.exit_code == 1

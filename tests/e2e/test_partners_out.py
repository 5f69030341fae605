"""Partners with little stock, long outages or failing refunds: orders end as they should, though maybe late."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.conftest import StartService, System, client, order
from tests.harness.commands import orders
from tests.harness.processes import Service
from tests.harness.wait import wait_until

LAST, BUYERS = 5, 40


async def place_many(system: System, orders: int, body: Mapping[str, Any], **settings: str) -> list[Service]:
    services = [await system.start(**settings), await system.start(**settings)]
    await asyncio.gather(*(system.place(services, f"key-{number}", body) for number in range(orders)))
    return services


async def test_the_last_units_are_sold_once(system: System) -> None:
    """As many orders are confirmed as there are units."""
    (await system.sandbox.put("/stock/LAST-ONES", json={"quantity": LAST})).raise_for_status()
    body = {"items": [{"sku": "LAST-ONES", "quantity": 1, "unit_price": "9.99"}]}
    await place_many(system, BUYERS, body)
    await system.all_ended()
    query = "SELECT concat_ws(': ', status, status_reason) AS ending, count(*) FROM orders GROUP BY ending"
    told = {row["ending"]: row["count"] for row in await system.pool.fetch(query)}
    assert told == {"confirmed": LAST, "rejected: out-of-stock": BUYERS - LAST}
    assert await system.violations({"LAST-ONES": LAST}) == []


async def test_partner_down_past_the_deadline(system: System, start_service: StartService, tmp_path: Path) -> None:
    """Orders compensate at their deadline, and end when the partner works again. Payment is a separate sandbox."""
    args = ("sandbox", "--ledger", str(tmp_path / "ledger.sqlite"))
    others, payment = await start_service({}, args), await start_service({}, args)
    system.env = {
        **system.env,
        "ORDERS_INVENTORY_URL": others.url,
        "ORDERS_PAYMENT_URL": payment.url,
        "ORDERS_SHIPPING_URL": others.url,
    }
    await payment.kill()
    await place_many(system, 10, order())
    await wait_until(lambda: not_sent(system, "do", 10), 60, "charges that nobody heard")
    assert await system.statuses() == {("pending", None)}
    await system.pool.execute("UPDATE sagas SET deadline_at = clock_timestamp()")
    await wait_until(lambda: not_sent(system, "undo", 10), 60, "refunds that nobody heard")
    assert await system.statuses() == {("compensating", "timed-out")}
    await payment.start()
    await system.all_ended()
    assert await system.statuses() == {("rejected", "timed-out")}
    async with client(others.url) as system.sandbox:
        assert await system.violations() == []


async def not_sent(system: System, action: str, orders: int) -> bool:
    """Return whether so many orders have retried the payment partner without a connection."""
    query = """
        SELECT count(DISTINCT saga_id) = $2 FROM saga_steps
        WHERE (step, action, outcome) = ('charge_payment', $1, 'not-sent') AND attempt > 1
    """
    return bool(await system.pool.fetchval(query, action, orders))


async def test_order_ends_only_after_its_refund(
    system: System,
) -> None:
    """While the refund fails, the order is shown as compensating."""
    await system.faults({"target": "payment.refund", "kind": "error"})
    services = await place_many(system, 3, order("UNDELIVERABLE"), saga_needs_operator_seconds="0.5")
    await wait_until(lambda: refused_often(system, 3), 60, "many refunds that failed")
    await wait_until(lambda: need_operators(services, 3), 60, "word in the metrics of all")
    assert len(await listed_as_stuck(system)) == 3
    assert await system.statuses() == {("compensating", "undeliverable")}
    assert await told(system) == {"orders.order.placed.v1"}
    await system.faults()
    await system.all_ended()
    await wait_until(lambda: need_operators(services, 0), 60, "the all-clear in the metrics of all")
    assert await listed_as_stuck(system) == []
    assert await system.statuses() == {("rejected", "undeliverable")}
    assert await system.violations() == []


async def refused_often(system: System, orders: int) -> bool:
    query = "SELECT count(DISTINCT saga_id) = $1 FROM saga_steps WHERE step = 'charge_payment' AND attempt >= 10"
    return bool(await system.pool.fetchval(query, orders))


async def told(system: System) -> set[str]:
    return {row["type"] for row in await system.pool.fetch("SELECT type FROM outbox")}


async def need_operators(services: list[Service], orders: int) -> bool:
    async def text(service: Service) -> str:
        async with client(service.url) as http:
            return (await http.get("/metrics")).raise_for_status().text

    return all([f"saga_needs_operator {orders}.0\n" in await text(service) for service in services])


async def listed_as_stuck(system: System) -> list[Any]:
    code, out, err = await orders("saga", "list", "--stuck", "--json", database_url=system.env["ORDERS_DATABASE_URL"])
    assert (code, err) == (0, "")
    return list(json.loads(out)["sagas"])

"""A small story for the pages to show: what went well, what was refused, and what needs an operator."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx

from app.db import Pool
from app.operations import partners, sagas
from app.operations.audit import AuditActor
from tests.harness import planting
from tests.harness.wait import AMPLE_SECONDS, wait_until

SETTINGS = {"inbox_max_attempts": "2"}  # so that a dead letter is soon there
BOUGHT = (
    ("cus_adeyemi", "LAMP-BRASS", 1, "129.00"),
    ("cus_brandt", "MUG-BLUE", 6, "8.50"),
    ("cus_castro", "NOTEBOOK-A5", 12, "4.20"),
    ("cus_dubois", "CHAIR-OAK", 4, "249.90"),
    ("cus_eriksen", "WIDGET", 3, "9.99"),
    ("cus_fischer", "KETTLE-STEEL", 1, "59.00"),
)
UNLUCKY = "pm_account_far_away"  # the payments that fail
ADA = "ada"


@dataclass(frozen=True)
class Story:
    """The orders, by what became of them: ids."""

    confirmed: list[str]
    rejected: str
    dead: str
    waiting: list[str]
    stuck: str

    @property
    def kinds(self) -> list[str]:
        """One order of each kind."""
        return [self.confirmed[0], self.rejected, self.dead, self.waiting[0], self.stuck]


async def tell(service: httpx.AsyncClient, sandbox: httpx.AsyncClient, pool: Pool) -> Story:
    """Place the orders, and wait until each has come as far as it comes."""
    confirmed = [await place(service, *bought) for bought in BOUGHT]
    rejected = await place(service, "cus_garcia", "LAMP-BRASS", 2, "129.00", payment_method="pm_card_declined")
    for order_id in (*confirmed, rejected):
        await _wait_for(pool, "SELECT status IN ('confirmed', 'rejected') FROM orders WHERE id = $1", order_id)
    dead = await lose_event(service, pool)
    await partners.pause(pool, "shipping", 1800, AuditActor(ADA, "the carrier is changing its labels"))
    await wait_until(lambda: is_paused(service, "shipping"), AMPLE_SECONDS, "pause of shipping")
    waiting = [await place(service, *bought, key=f"waiting-{bought[0]}") for bought in BOUGHT[:2]]
    for order_id in waiting:
        await _wait_for(
            pool, "SELECT step = 'create_shipment' AND finished_at IS NULL FROM sagas WHERE id = $1", order_id
        )
    stuck = await _break_refund(service, sandbox, pool)
    return Story(confirmed, rejected, dead, waiting, stuck)


async def place(
    service: httpx.AsyncClient, customer: str, sku: str, quantity: int, price: str, *, key: str = "", **more: Any
) -> str:
    """Place an order; return its id."""
    items = [{"sku": sku, "quantity": quantity, "unit_price": price}]
    body = {"customer_id": customer, "items": items, **more}
    headers = {"Idempotency-Key": key or f"{customer}-{sku}"}
    answer = (await service.post("/orders", json=body, headers=headers)).raise_for_status()
    return str(answer.json()["id"])


async def is_paused(service: httpx.AsyncClient, partner: str) -> bool:
    """Return whether the process knows of the pause."""
    return f'partner_paused{{partner="{partner}"}} 1.0' in (await service.get("/metrics")).text


async def lose_event(service: httpx.AsyncClient, pool: Pool) -> str:
    """Place an order whose event becomes a dead letter."""
    async with planting.failing_handler(pool):
        dead = await place(service, "cus_haddad", "MUG-BLUE", 2, "8.50")
        query = (
            "SELECT EXISTS (SELECT FROM outbox o JOIN inbox i ON i.message_id = o.id::text AND i.dead_at IS NOT NULL"
        )
        await _wait_for(pool, f"{query} WHERE o.subject = $1::uuid::text)", dead)
    return dead


async def _break_refund(service: httpx.AsyncClient, sandbox: httpx.AsyncClient, pool: Pool) -> str:
    """Place an order whose charge gets no clear answer until its deadline, and whose refund gets none either."""
    charge = {"target": "payment.charge", "kind": "error", "match": {"payment_method": UNLUCKY}}
    (await sandbox.put("/faults", json=[charge])).raise_for_status()
    stuck = await place(service, "cus_ivanova", "CHAIR-OAK", 2, "249.90", payment_method=UNLUCKY)
    await _wait_for(pool, "SELECT step = 'charge_payment' AND attempts >= 2 FROM sagas WHERE id = $1", stuck)
    refund = {"target": "payment.refund", "kind": "error", "match": {"saga_id": stuck}}
    (await sandbox.put("/faults", json=[charge, refund])).raise_for_status()
    await pool.execute("UPDATE sagas SET deadline_at = clock_timestamp() - interval '5 min' WHERE id = $1", UUID(stuck))
    await _wait_for(pool, "SELECT direction = 'backward' AND attempts >= 2 FROM sagas WHERE id = $1", stuck)
    await sagas.retry(pool, UUID(stuck), AuditActor(ADA, "the payment provider says that refunds work again"))
    await _wait_for(pool, "SELECT direction = 'backward' AND attempts >= 3 FROM sagas WHERE id = $1", stuck)
    return stuck


async def _wait_for(pool: Pool, query: str, order_id: str) -> None:
    await wait_until(lambda: pool.fetchval(query, UUID(order_id)), AMPLE_SECONDS, query)

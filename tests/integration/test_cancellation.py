"""A cancel at every instant of an order's life: it is refused, or the order ends with everything undone."""

import asyncio
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.errors import DatabaseUnavailable, OrderNotCancellable, OrderNotFound
from app.orders.models import Line
from app.saga import store
from app.saga.plan import Action, Step
from tests.harness.cancelling import TRACE, CancelAt, cancel, cancel_under_way
from tests.harness.orders import DEADLINE_SECONDS, event_of, placed, somebody_waits, start_saga
from tests.harness.sagas import GatedPayment, Stage
from tests.harness.sandboxes import AMPLE_SECONDS, set_faults
from tests.harness.wait import wait_until

CANCELLED = "cancelled: cancelled-by-customer"
DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
UNDELIVERABLE = {"lines": (Line("UNDELIVERABLE", 3, 999),)}
DO = ("inventory.hold", "payment.charge", "inventory.commit", "shipping.create")

FORWARD = [f"saga.{step}.{Action.DO}.{when}" for step in Step for when in ("attempted", "answered")]
BACKWARD = [
    f"saga.{step}.{Action.UNDO}.{when}"
    for step in (Step.CREATE_SHIPMENT, Step.CHARGE_PAYMENT, Step.RESERVE_INVENTORY)
    for when in ("attempted", "answered")
]


async def events(pool: asyncpg.Pool) -> list[tuple[str, int]]:
    rows = await pool.fetch("SELECT type, sequence FROM outbox ORDER BY sequence")
    return [(row["type"].split(".")[2], row["sequence"]) for row in rows]


async def start(pool: asyncpg.Pool, order_id: UUID) -> None:
    """Start the saga of an order by its `order.placed`, however late that is delivered."""
    row = await pool.fetchrow("SELECT * FROM outbox WHERE sequence = 1 AND subject = $1", str(order_id))
    assert row is not None
    async with pool.acquire() as conn, conn.transaction():
        await conn.fetchval("SELECT pg_advisory_xact_lock(1)")
        envelope = event_of(await Stage.order(Stage(pool, None, None), order_id))  # type: ignore[arg-type]
        await store.start(conn, envelope, DEADLINE_SECONDS)

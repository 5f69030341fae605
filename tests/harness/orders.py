"""Orders and sagas directly in the database, without HTTP and without a broker."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any
from uuid import UUID

import asyncpg

from app.api.orders.deps import stored_response
from app.db import BATCH_LOCKS_SECONDS, Pool
from app.idempotency import Idempotency, IdempotencyConfig
from app.idempotency import store as key_store
from app.idempotency.key import IdempotencyKey
from app.idempotency.store import StoredResponse
from app.messaging.envelope import Envelope
from app.observability.signals import Signals
from app.orders import events
from app.orders import store as order_store
from app.orders.model import Line, Order
from app.orders.store import PlaceOrder
from app.saga import start
from app.saga.steps import PLANS, Plans

TENANT = "default"
DEADLINE_SECONDS = 900.0


def command(**changes: Any) -> PlaceOrder:
    """Return a customer's command: three widgets, 29.97 USD."""
    wish: dict[str, Any] = {"tenant": TENANT, "currency": "USD", "lines": (Line("WIDGET", 3, 999),)}
    return PlaceOrder(**(wish | changes))


async def place(
    pool: Pool,
    key: IdempotencyKey | None = None,
    *,
    ttl_seconds: float = 86_400,
    wait_seconds: float = 20,
    trace: dict[str, str] | None = None,
    **changes: Any,
) -> StoredResponse:
    """Place an order as the API does."""
    config = IdempotencyConfig(ttl_seconds, wait_seconds, concurrency=10)
    row = order_store.new_order(command(**changes), trace or {})
    response = stored_response(row.order, HTTPStatus.CREATED)
    return await Idempotency(pool, None, config, Signals()).run(key, order_store.insert, lambda: (row, response))


async def placed(pool: Pool, **changes: Any) -> Order:
    """Place an order and return it."""
    answer = await place(pool, **changes)
    return await order_store.get(pool, changes.get("tenant", TENANT), UUID(answer.location.rpartition("/")[2]))


def event_of(order: Order, **trace: str) -> Envelope:
    """Return the event of the order's current status."""
    event = events.event_for(order, trace)
    assert event is not None
    return event


async def start_saga(pool: Pool, **changes: Any) -> UUID:
    """Place an order and start its saga, as the consumer does. Return their id."""
    return await start_saga_of(pool, PLANS, changes)


async def start_saga_of(pool: Pool, plans: Plans, changes: Mapping[str, Any]) -> UUID:
    """Place an order and start its saga with the newest of these plans. Return their id."""
    order = await placed(pool, **changes)
    async with pool.acquire() as conn, conn.transaction():
        await start.handle_order_placed(conn, [event_of(order)], DEADLINE_SECONDS, plan_version=max(plans), plans=plans)
    return order.id


async def retry_undo(pool: Pool, saga_id: UUID, times: int) -> None:
    """Add failed undos of the charge to the saga's log."""
    query = """
        INSERT INTO saga_steps (saga_id, step, action, attempt, outcome)
        SELECT $1, 'charge_payment', 'undo', attempt, 'unknown' FROM generate_series(2, $2::int + 1) AS attempt
    """
    await pool.execute(query, saga_id, times)


@contextlib.asynccontextmanager
async def request_under_way(pool: Pool, key: IdempotencyKey) -> AsyncIterator[asyncpg.transaction.Transaction]:
    """Hold the key like a request that has not committed yet. Roll back unless the test commits."""
    async with pool.acquire() as conn:
        transaction = conn.transaction()
        await transaction.start()
        answer = StoredResponse(201, "/orders/first", b"the first answer")
        assert await key_store.acquire(conn, key, answer, ttl_seconds=60, wait_seconds=1)
        yield transaction
        if conn.is_in_transaction():
            await transaction.rollback()


async def somebody_waits(pool: Pool) -> bool:
    """Return whether any session waits for a lock in this database."""
    waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(await pool.fetchval(f"SELECT EXISTS ({waiting})"))


async def somebody_waits_alone(pool: Pool) -> bool:
    """Return whether any session has waited for a lock for longer than a batch does."""
    waiting = "SELECT FROM pg_locks WHERE NOT granted AND waitstart < clock_timestamp() - make_interval(secs => $1)"
    return bool(await pool.fetchval(f"SELECT EXISTS ({waiting})", 2 * BATCH_LOCKS_SECONDS))

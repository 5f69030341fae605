"""The same job with SQLAlchemy Core and aiohttp: what a careful author writes without an ORM.

One statement per write, all rows of a relay's batch in one statement, one connection pool. As `orm.py`, it has no
leases, no compensation and no limits.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import aio_pika
import aiohttp
import uvicorn
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from fastapi import FastAPI, Header
from sqlalchemy import BigInteger, Column, DateTime, Identity, Integer, MetaData, Table, Text, Uuid, func
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import create_async_engine

from bench.floors import events, steps
from bench.floors.fastapi_only import NewOrder
from bench.floors.steps import STEPS, Line

BATCH = 200
PREFETCH = 64
CONNECTIONS = 20

metadata = MetaData()
orders = Table(
    "orders",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("idempotency_key", Text, unique=True),
    Column("status", Text, nullable=False),
    Column("step", Text),
    Column("currency", Text, nullable=False),
    Column("total_minor", BigInteger, nullable=False),
    Column("lines", JSONB, nullable=False),
    Column("placed_at", DateTime(timezone=True), nullable=False, index=True),
    Column("updated_at", DateTime(timezone=True), nullable=False),
)
outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("type", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    Column("published_at", DateTime(timezone=True)),
)
engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:"), pool_size=CONNECTIONS, max_overflow=0
)
placed = asyncio.Event()


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the tables, and run relay and consumer."""
    async with engine.begin() as conn:
        await conn.run_sync(metadata.create_all)
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(await aio_pika.connect(os.environ["RABBITMQ_URL"]))
        connector = aiohttp.TCPConnector(limit=0)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(os.environ["PARTNERS_URL"], connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        )
        channel = await broker.channel(on_return_raises=True)
        await events.declare(channel)
        consuming = await broker.channel()
        await consuming.set_qos(PREFETCH)
        queue = await consuming.get_queue(events.QUEUE)
        await queue.consume(lambda message: finish(message, client))
        relay = asyncio.create_task(publish(channel))
        stack.callback(relay.cancel)
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def place(order: NewOrder, idempotency_key: Annotated[str, Header()]) -> dict[str, Any]:
    """Store an order and its event; for a known key return the order that it has."""
    now = datetime.now(UTC)
    lines = [
        {"sku": item.sku, "quantity": item.quantity, "unit_price_minor": int(item.unit_price * 100)}
        for item in order.items
    ]
    total = sum(item.quantity * int(item.unit_price * 100) for item in order.items)
    row = {
        "id": uuid4(), "idempotency_key": idempotency_key, "status": "pending", "currency": order.currency,
        "total_minor": total, "lines": lines, "placed_at": now, "updated_at": now,
    }  # fmt: skip
    async with engine.begin() as conn:
        unless_known = insert(orders).on_conflict_do_nothing(index_elements=["idempotency_key"])
        inserted = await conn.execute(unless_known, row)
        if inserted.rowcount:
            await conn.execute(outbox.insert(), {"type": events.PLACED, "data": {"order_id": str(row["id"])}})
        else:
            found = await conn.execute(orders.select().where(orders.c.idempotency_key == idempotency_key))
            row = dict(found.mappings().one())
    placed.set()
    return {name: value for name, value in row.items() if name != "idempotency_key"}


async def publish(channel: AbstractChannel) -> None:
    """Publish what is in the outbox, for ever."""
    query = outbox.select().where(outbox.c.published_at.is_(None)).order_by(outbox.c.id).limit(BATCH)
    while True:
        placed.clear()
        async with engine.begin() as conn:
            rows = (await conn.execute(query.with_for_update(skip_locked=True))).all()
            if rows:
                await asyncio.gather(
                    *(events.publish(channel, json.dumps(row.data).encode(), row.type) for row in rows)
                )
                ids = [row.id for row in rows]
                await conn.execute(outbox.update().where(outbox.c.id.in_(ids)).values(published_at=func.now()))
        if not rows:
            await placed.wait()


async def finish(message: AbstractIncomingMessage, client: aiohttp.ClientSession) -> None:
    """Call the partners, one after the other; commit each step and the end."""
    async with message.process(requeue=True):
        order_id = UUID(json.loads(message.body)["order_id"])
        this = orders.c.id == order_id
        async with engine.connect() as conn:
            found = (await conn.execute(orders.select().where(this))).one()
        lines = [Line(**line) for line in found.lines]
        for step in STEPS:
            headers = {"Idempotency-Key": steps.key(step, order_id)}
            async with client.post(step.path, json=steps.body(step, order_id, lines), headers=headers) as reply:
                await reply.read()
            if reply.status != step.status:
                raise RuntimeError(f"{step.name}: {reply.status}")
            changes: dict[str, Any] = {"step": step.name, "updated_at": datetime.now(UTC)}
            async with engine.begin() as conn:
                if step is STEPS[-1]:
                    changes["status"] = "confirmed"
                    await conn.execute(outbox.insert(), {"type": events.CONFIRMED, "data": {"order_id": str(order_id)}})
                await conn.execute(orders.update().where(this), changes)
    placed.set()


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning", timeout_keep_alive=75)

"""The usual orders service: SQLAlchemy's ORM, httpx and aio-pika, one unit of work per request.

It does the whole job: order and outbox row in one transaction, a relay, a consumer that calls the four partners and
commits each step, and the event of the end. It keeps the key in a unique column, and does not check what a retry sends.
It has no leases, no compensation and no limits. ROLES=api only accepts orders.
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
import httpx
import uvicorn
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from fastapi import Depends, FastAPI, Header
from sqlalchemy import DateTime, ForeignKey, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from bench.floors import events, steps
from bench.floors.fastapi_only import NewOrder
from bench.floors.steps import STEPS, Line

BATCH = 200
PREFETCH = 64
CONNECTIONS = 20

engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:"), pool_size=CONNECTIONS, max_overflow=0
)
Session = async_sessionmaker(engine, expire_on_commit=False)
placed = asyncio.Event()


class Base(DeclarativeBase):
    """The declarative base."""


class OrderRow(Base):
    """An order."""

    __tablename__ = "orders"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    status: Mapped[str]
    step: Mapped[str | None]
    currency: Mapped[str]
    total_minor: Mapped[int]
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), index=True)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    lines: Mapped[list["LineRow"]] = relationship()


class LineRow(Base):
    """One line of an order."""

    __tablename__ = "order_lines"
    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    quantity: Mapped[int]
    unit_price_minor: Mapped[int]


class OutboxRow(Base):
    """An event, until it is published."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    published_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


async def session() -> AsyncIterator[AsyncSession]:
    """Open a session for a request."""
    async with Session() as opened:
        yield opened


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the tables, and run relay and consumer."""
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)
    async with contextlib.AsyncExitStack() as stack:
        if os.environ.get("ROLES") != "api":
            broker = await stack.enter_async_context(await aio_pika.connect(os.environ["RABBITMQ_URL"]))
            client = await stack.enter_async_context(
                httpx.AsyncClient(base_url=os.environ["PARTNERS_URL"], trust_env=False)
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
async def place(
    order: NewOrder, db: Annotated[AsyncSession, Depends(session)], idempotency_key: Annotated[str, Header()]
) -> dict[str, Any]:
    """Store an order and its event; for a known key return the order that it has."""
    now = datetime.now(UTC)
    lines = [
        LineRow(number=number, sku=item.sku, quantity=item.quantity, unit_price_minor=int(item.unit_price * 100))
        for number, item in enumerate(order.items)
    ]
    total = sum(line.quantity * line.unit_price_minor for line in lines)
    row = OrderRow(
        id=uuid4(), idempotency_key=idempotency_key, status="pending", currency=order.currency, total_minor=total,
        placed_at=now, updated_at=now, lines=lines,
    )  # fmt: skip
    db.add_all([row, OutboxRow(type=events.PLACED, data={"order_id": str(row.id)})])
    try:
        await db.commit()
    except IntegrityError:
        await db.rollback()
        query = select(OrderRow).options(selectinload(OrderRow.lines))
        row = (await db.scalars(query.where(OrderRow.idempotency_key == idempotency_key))).one()
    placed.set()
    return answer(row)


def answer(row: OrderRow) -> dict[str, Any]:
    """Return the JSON of an order."""
    return {
        "id": row.id, "status": row.status, "currency": row.currency, "total": f"{row.total_minor / 100:.2f}",
        "items": [
            {"sku": line.sku, "quantity": line.quantity, "unit_price": f"{line.unit_price_minor / 100:.2f}"}
            for line in row.lines
        ],
        "placed_at": row.placed_at, "updated_at": row.updated_at,
    }  # fmt: skip


async def publish(channel: AbstractChannel) -> None:
    """Publish what is in the outbox, for ever."""
    query = select(OutboxRow).where(OutboxRow.published_at.is_(None)).order_by(OutboxRow.id).limit(BATCH)
    while True:
        placed.clear()
        async with Session() as db, db.begin():
            rows = (await db.scalars(query.with_for_update(skip_locked=True))).all()
            await asyncio.gather(*(events.publish(channel, json.dumps(row.data).encode(), row.type) for row in rows))
            for row in rows:
                row.published_at = datetime.now(UTC)
        if not rows:
            await placed.wait()


async def finish(message: AbstractIncomingMessage, client: httpx.AsyncClient) -> None:
    """Call the partners, one after the other; commit each step and the end."""
    async with message.process(requeue=True), Session() as db:
        order_id = UUID(json.loads(message.body)["order_id"])
        row = await db.get_one(OrderRow, order_id, options=[selectinload(OrderRow.lines)])
        lines = [Line(line.sku, line.quantity, line.unit_price_minor) for line in row.lines]
        for step in STEPS:
            headers = {"Idempotency-Key": steps.key(step, order_id)}
            reply = await client.post(step.path, json=steps.body(step, order_id, lines), headers=headers)
            if reply.status_code != step.status:
                raise RuntimeError(f"{step.name}: {reply.status_code}")
            row.step = step.name
            row.updated_at = datetime.now(UTC)
            if step is STEPS[-1]:
                row.status = "confirmed"
                db.add(OutboxRow(type=events.CONFIRMED, data={"order_id": str(order_id)}))
            await db.commit()
    placed.set()


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning", timeout_keep_alive=75)

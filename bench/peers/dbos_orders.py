"""Orders with DBOS: one workflow per order, one step per partner call, DBOS's own durable start instead of a broker."""

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

import aiohttp
import uvicorn
from dbos import DBOS, DBOSConfig, SetWorkflowID
from fastapi import FastAPI, Header

from bench.floors.fastapi_only import NewOrder
from bench.floors.steps import STEPS, Line, Step, body, key

CONNECTIONS = 20
sessions: list[aiohttp.ClientSession] = []


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the HTTP session of the steps."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        os.environ["PARTNERS_URL"], connector=connector, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        sessions.append(session)
        DBOS.launch()
        yield


app = FastAPI(lifespan=lifespan)


@DBOS.step()  # type: ignore[untyped-decorator] # dbos is not installed where types are checked
async def call_partner(step: Step, order_id: str, lines: list[Line]) -> int:
    """Call a partner."""
    headers = {"Idempotency-Key": key(step, order_id)}
    async with sessions[0].post(step.path, json=body(step, order_id, lines), headers=headers) as reply:
        await reply.read()
    if reply.status != step.status:
        raise RuntimeError(f"{step.name}: {reply.status}")
    return reply.status


@DBOS.workflow()  # type: ignore[untyped-decorator] # see above
async def finish(order_id: str, lines: list[Line]) -> str:
    """Call the partners, one after the other. DBOS stores the lines, each step and the end."""
    for step in STEPS:
        await call_partner(step, order_id, lines)
    return "confirmed"


@app.post("/orders", status_code=201)
async def place(order: NewOrder, idempotency_key: Annotated[str, Header()]) -> dict[str, Any]:
    """Start the workflow of an order, with the key as its id."""
    order_id = str(uuid4())
    lines = [Line(item.sku, item.quantity, int(item.unit_price * 100)) for item in order.items]
    with SetWorkflowID(idempotency_key):
        await DBOS.start_workflow_async(finish, order_id, lines)
    total = sum(line.quantity * line.unit_price_minor for line in lines)
    return {"id": order_id, "status": "pending", "total_minor": total, "placed_at": datetime.now(UTC)}


if __name__ == "__main__":
    config = DBOSConfig(
        name="bench-orders",
        system_database_url=os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:"),
        sys_db_pool_size=CONNECTIONS,
        log_level="WARNING",
    )
    DBOS(config=config)
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning", timeout_keep_alive=75)

"""If the broker refuses the topology, readiness names the reason, and nothing is lost meanwhile."""

from pathlib import Path
from typing import Any

import aio_pika
import httpx

from app.db import Pool
from app.operations.dead_letters import DeadLetterAction
from tests.harness import servers
from tests.harness.api import serving
from tests.harness.dead_letters import go_over, in_queue, put_many
from tests.harness.messages import next_message, open_channel
from tests.harness.queues import QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

NOWHERE = "http://127.0.0.1:1"
WORKING = {"roles": "relay,consumer", "inventory_url": NOWHERE, "payment_url": NOWHERE, "shipping_url": NOWHERE}


async def rabbitmq_row(process: httpx.AsyncClient) -> tuple[int, dict[str, Any]]:
    answer = await process.get("/readyz")
    [row] = [row for row in answer.json()["checks"] if row["name"] == "rabbitmq"]
    return answer.status_code, row


async def becomes(process: httpx.AsyncClient, code: int, status: str, detail: str) -> None:
    """Wait until readiness has this code, and its broker check this status and start of its detail."""

    async def difference() -> tuple[int, dict[str, Any]] | None:
        seen_code, row = await rabbitmq_row(process)
        same = (seen_code, row["status"]) == (code, status) and row["detail"].startswith(detail)
        return None if same else (seen_code, row)

    async def is_so() -> bool:
        return await difference() is None

    try:
        await wait_until(is_so, AMPLE_SECONDS, f"{code} {status}: {detail}")
    except AssertionError as error:
        error.add_note(f"last seen: {await difference()}")
        raise


async def test_a_missing_right_is_named(server_directory: Path, database_url: str, pool: Pool) -> None:
    """The topology exists, but the user may not declare it; a user with only the documented rights may."""
    async with servers.rabbitmq(server_directory) as broker:
        url = broker.url().replace("orders:orders", "documented:documented")
        async with serving(database_url, rabbitmq_url=url, **WORKING) as process:
            await becomes(process, 200, "ok", "reachable")
        async with open_channel(broker.url()) as channel:
            [letter] = await put_many(channel, 1)
            await go_over(in_queue(pool, url), DeadLetterAction.REPLAY)
            assert (await next_message(channel, QUEUE)).message_id == letter
        url = broker.url().replace("orders:orders", "limited:limited")
        async with serving(database_url, rabbitmq_url=url, **WORKING) as process:
            await becomes(
                process, 503, "down", "the broker refuses access to exchange orders.events: a right is missing"
            )
        async with serving(database_url, rabbitmq_url=url, **{**WORKING, "roles": "api,relay,consumer"}) as process:
            await becomes(
                process, 200, "degraded", "the broker refuses access to exchange orders.events: a right is missing"
            )


async def test_a_queue_with_other_arguments_is_named(rabbitmq_url: str, database_url: str) -> None:
    """Once the queue is deleted, it is declared again, and readiness recovers."""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 5})
        async with serving(database_url, rabbitmq_url=rabbitmq_url, **WORKING) as process:
            await becomes(process, 503, "down", "queue orders.saga exists with another x-")
            await channel.queue_delete(QUEUE)
            await becomes(process, 200, "ok", "reachable")

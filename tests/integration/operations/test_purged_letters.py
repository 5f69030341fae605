"""A purge by a command or route is a decision: the order is listed as purged until it is replayed or final."""

from typing import Any
from uuid import UUID

import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool
from app.operations.dead_letter_views import DeadLettersAnswer, TreatedAnswer
from app.operations.maintenance.lost_letters import LostLetters
from app.operations.maintenance.resender import Resender
from app.operations.saga_views import SagasAnswer
from tests.harness.api import serving
from tests.harness.cancelling import cancel
from tests.harness.commands import module, orders
from tests.harness.dead_letters import holds, in_queue, set_aside
from tests.harness.events import counted
from tests.harness.lost_letters import FAILURE, age, dead_lettered, pending
from tests.harness.observed import Observed
from tests.harness.operating import recorded
from tests.harness.orders import event_of, placed
from tests.harness.queues import CONSUMER, DEAD_LETTER_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

TOKEN = "a-token-of-the-operators"


@pytest.fixture
def env(database_url: str, rabbitmq_url: str) -> dict[str, str]:
    return {"database_url": database_url, "rabbitmq_url": rabbitmq_url}


async def sent_again(pool: Pool, rabbitmq_url: str) -> set[UUID]:
    """Run everything that resends events for an hour; return the pending events."""
    await age(pool)
    lost = LostLetters(in_queue(pool, rabbitmq_url, CONSUMER), Observed(), pause_seconds=0)
    for _ in range(3):
        await lost.run_once()
    assert await unstarted(pool) is not None
    return await pending(pool)


async def unstarted(pool: Pool) -> float | None:
    """Run the resender; return how many unstarted orders it counted."""

    async def depths() -> tuple[int, int]:
        return 0, 0

    signals = Observed()
    await Resender(pool, CONSUMER, depths, signals).run_once()
    return counted(signals, "orders_unstarted")


async def listed(env: dict[str, str], *args: str) -> dict[str, str]:
    _, out, _ = await orders("saga", "list", "--json", *args, **env)
    return {order.order_id: order.event for order in SagasAnswer.model_validate_json(out).unstarted}


async def test_a_purged_event_is_listed_until_replayed(
    env: dict[str, str], pool: Pool, channel: AbstractChannel
) -> None:
    """The order of a purged event is listed until the event is replayed."""
    purged, waiting = await dead_lettered(pool, env["rabbitmq_url"], channel, 2)
    selected = ("--id", str(purged).upper())  # ids are case-insensitive
    assert (await orders("dlq", "purge", *selected, **env))[:2] == (0, "purged: 1 of 2 dead letters of orders.saga\n")
    assert await sent_again(pool, env["rabbitmq_url"]) == set()
    assert await unstarted(pool) == 2
    expected = {str(purged): "purged", str(waiting): "dead-letter"}
    assert await listed(env) == await listed(env, "--stuck", "--status", "pending") == expected
    assert await listed(env, "--status", "compensating") == {}
    _, out, _ = await orders("saga", "list", **env)
    assert out.startswith("0 unfinished sagas shown\n\n2 orders shown that cannot start\n\n")
    assert f"{purged}  pending\n  age     " in out
    assert "  event   was purged, since 20" in out
    assert "  event   is a dead letter, since 20" in out
    assert f", 1 attempts\n  reason  {FAILURE}\n" in out

    code, out, _ = await orders("dlq", "replay", *selected, "--dry-run", **env)
    assert (code, out.splitlines()[1]) == (
        0,
        f"would be sent again from the outbox: {selected[1]}, whose order has not started",
    )
    assert await pending(pool) == set()
    sent = f"sent again from the outbox: {selected[1]}, whose order has not started\n"
    assert await orders("dlq", "replay", *selected, **env) == (
        0,
        f"replayed: 0 of 1 dead letters of orders.saga\n{sent}",
        "",
    )
    assert await pending(pool) == {purged}
    assert await listed(env) == {str(waiting): "dead-letter"}
    row = await pool.fetchrow("SELECT attempts, dead_at, purged_at FROM inbox WHERE message_id = $1", str(purged))
    assert row is not None
    assert tuple(row) == (0, None, None)
    await cancel(pool, waiting)
    assert await listed(env) == {}


async def test_a_purge_killed_before_removing_stays_recorded(
    env: dict[str, str], pool: Pool, channel: AbstractChannel
) -> None:
    """A purge that is killed before it removes letters stays recorded."""
    [order_id] = await dead_lettered(pool, env["rabbitmq_url"], channel)
    assert (await module("tests.harness.crashing_dlq", "purge", "dlq.recorded", **env))[0] == -9
    await holds(channel, 1)
    assert await recorded(pool) == ["dlq purge unfinished"]
    assert await listed(env) == {str(order_id): "purged"}
    _, out, _ = await orders("dlq", "peek", "--json", **env)
    [letter] = DeadLettersAnswer.model_validate_json(out).dead_letters
    assert letter.inbox.startswith("purged at 20")
    await (await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)).purge()
    assert await sent_again(pool, env["rabbitmq_url"]) == set()


async def test_a_letter_without_an_inbox_row_can_be_purged(
    env: dict[str, str], pool: Pool, channel: AbstractChannel
) -> None:
    """The broker itself may dead-letter a message. The event of another order is not affected."""
    order = await placed(pool)
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
    for _ in range(2):  # an interrupted replay leaves two copies
        await set_aside(channel, event_of(order))
    await holds(channel, 2)
    assert (await orders("dlq", "purge", **env))[:2] == (0, "purged: 2 of 2 dead letters of orders.saga\n")
    assert await sent_again(pool, env["rabbitmq_url"]) == set()
    assert await listed(env) == {str(order.id): "purged"}


async def test_a_purged_order_is_listed_and_replayed_over_http(
    env: dict[str, str], pool: Pool, channel: AbstractChannel, sandbox_url: str
) -> None:
    """The relay polls once an hour, so the replay must wake it."""
    [order_id] = await dead_lettered(pool, env["rabbitmq_url"], channel)
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    settings: dict[str, Any] = {"roles": "api,relay,consumer", "outbox_poll_seconds": 3600, "admin_token": TOKEN}
    async with serving(**env, **settings, **urls) as ops:
        ops.headers["Authorization"] = f"Bearer {TOKEN}"
        answer = await ops.post("/ops/dlq/purge", json={"id": str(order_id)})
        assert TreatedAnswer.model_validate(answer.json(), strict=True).done == 1
        [order] = SagasAnswer.model_validate((await ops.get("/ops/sagas")).json(), strict=True).unstarted
        assert (order.order_id, order.event, order.attempts, order.reason) == (
            str(order_id),
            "purged",
            1,
            FAILURE,
        )
        answer = await ops.post("/ops/dlq/replay", json={"id": str(order_id)})
        treated = TreatedAnswer.model_validate(answer.json(), strict=True)
        assert (treated.from_outbox, treated.done) == (True, 0)

        async def confirmed() -> bool:
            return bool(await pool.fetchval("SELECT status = 'confirmed' FROM orders"))

        await wait_until(confirmed, AMPLE_SECONDS, "end of the order")
        treated = TreatedAnswer.model_validate((await ops.post("/ops/dlq/replay", json={"id": str(order_id)})).json())
        assert (treated.from_outbox, treated.done) == (False, 0)

"""Actions of operators on messages are recorded before they happen, by command and by route."""

import json
import os
import pwd
import re
from typing import Any
from uuid import UUID

import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool
from app.errors import BrokerUnavailable
from app.observability.signals import Signals
from app.operations import outbox
from app.operations.dead_letters import DeadLetterAction
from app.operations.saga_views import SagaAnswer
from tests.harness.api import assert_problem, serving
from tests.harness.commands import orders
from tests.harness.dead_letters import go_over, holds, in_queue, put_many
from tests.harness.lost_letters import dead_lettered
from tests.harness.operating import OPERATOR, recorded
from tests.harness.orders import placed

TOKEN = "a-token-of-the-operators"
ACTOR = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
WHY = "the bug is fixed, INC-4711"
COUNTS = {"depth", "looked_at", "matched", "from_outbox"}


@pytest.fixture
def env(database_url: str, rabbitmq_url: str) -> dict[str, str]:
    return {"database_url": database_url, "rabbitmq_url": rabbitmq_url}


async def records(pool: Pool) -> list[tuple[Any, ...]]:
    """Return actor, action, order, reason, outcome, selection, and the number of selected messages."""
    found = []
    for row in await pool.fetch("SELECT * FROM operator_actions ORDER BY id"):
        selection, counts = [None if row[name] is None else json.loads(row[name]) for name in ("selection", "counts")]
        assert counts is None or counts.keys() == COUNTS
        story = [row[name] for name in ("actor", "action", "order_id", "reason", "outcome")]
        found.append((*story, selection, counts and counts["matched"]))
    return found


async def parked(pool: Pool) -> tuple[UUID, UUID]:
    """Park an event that is not the first one of its order; return its id and its order's."""
    order_id = (await placed(pool)).id
    row_id = await pool.fetchval(
        """
        UPDATE outbox SET id = gen_random_uuid(), parked_at = clock_timestamp(), attempts = 10
        WHERE subject = $1 RETURNING id
        """,
        str(order_id),
    )
    return row_id, order_id


async def test_commands_record_each_action(env: dict[str, str], pool: Pool, channel: AbstractChannel) -> None:
    """Reading commands are not recorded. The reason is optional, and refused if it is invalid."""
    [first, second] = await dead_lettered(pool, env["rabbitmq_url"], channel, 2)
    row_id, order_id = await parked(pool)
    for args in (("peek",), ("replay", "--dry-run"), ("purge", "--dry-run", "--reason", WHY)):
        assert (await orders("dlq", *args, **env))[0] == 0
    for command in (("dlq", "purge"), ("dlq", "replay", "--dry-run"), ("outbox", "requeue", str(row_id))):
        assert (await orders(*command, "--reason", "two\nlines", **env))[0] == 2
    assert (await orders("outbox", "requeue", str(first), **env))[0] == 1  # the row is not parked
    assert await records(pool) == []
    assert (await orders("dlq", "purge", "--id", str(first), "--reason", WHY, **env))[0] == 0
    assert (await orders("dlq", "replay", "--since", "2h", "--limit", "9", **env))[0] == 0
    assert (await orders("outbox", "requeue", str(row_id), "--reason", WHY, **env))[0] == 0
    assert await records(pool) == [
        (ACTOR, "dlq purge", first, WHY, "done", {"id": str(first)}, 1),
        (ACTOR, "dlq replay", None, "", "done", {"since_seconds": 7200, "limit": 9}, 1),
        (ACTOR, "outbox requeue", order_id, WHY, "pending", {"id": str(row_id)}, None),
    ]
    _, out, _ = await orders("saga", "show", str(first), **env)
    assert re.search(rf"operator +dlq purge +done \({re.escape(ACTOR)}: {re.escape(WHY)}\)", out)
    assert (await orders("saga", "show", str(second), **env))[1].count("dlq") == 0


async def test_routes_record_each_action(env: dict[str, str], pool: Pool, channel: AbstractChannel) -> None:
    """Each write route records the operator, the reason and the outcome."""
    [first, _] = await dead_lettered(pool, env["rabbitmq_url"], channel, 2)
    (row_id, order_id), (other, its_order) = await parked(pool), await parked(pool)
    async with serving(**env, admin_token=TOKEN) as ops:
        ops.headers["Authorization"] = f"Bearer {TOKEN}"
        (await ops.get("/ops/dlq")).raise_for_status()
        (await ops.post("/ops/dlq/purge", json={"dry_run": True, "reason": WHY})).raise_for_status()
        for path in ("dlq/purge", "dlq/replay", f"outbox/{row_id}/requeue"):
            assert_problem(await ops.post(f"/ops/{path}", json={"reason": " "}), 422, "validation-failed")
        assert await records(pool) == []
        (await ops.post("/ops/dlq/purge", json={"id": str(first), "reason": WHY})).raise_for_status()
        (await ops.post("/ops/dlq/replay")).raise_for_status()
        (await ops.post(f"/ops/outbox/{row_id}/requeue", json={"reason": WHY})).raise_for_status()
        (await ops.post(f"/ops/outbox/{other}/requeue")).raise_for_status()
        shown = SagaAnswer.model_validate((await ops.get(f"/ops/sagas/{its_order}")).json(), strict=True)
    assert [(each.action, each.reason, each.outcome) for each in shown.operator_actions] == [
        ("outbox requeue", "", "pending")
    ]
    assert await records(pool) == [
        ("admin-token", "dlq purge", first, WHY, "done", {"id": str(first), "limit": 100}, 1),
        ("admin-token", "dlq replay", None, "", "done", {"limit": 100}, 1),
        ("admin-token", "outbox requeue", order_id, WHY, "pending", {"id": str(row_id)}, None),
        ("admin-token", "outbox requeue", its_order, "", "pending", {"id": str(other)}, None),
    ]


async def test_an_action_that_matched_nothing_is_not_done(
    pool: Pool, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """Its row says that it changed nothing."""
    await holds(channel, 0)
    await go_over(in_queue(pool, rabbitmq_url), DeadLetterAction.PURGE)
    assert await outbox.requeue_all(pool, 10, OPERATOR) == 0
    assert await recorded(pool) == ["dlq purge nothing-matched", "outbox requeue nothing-matched"]


async def test_a_failed_action_is_recorded_as_failed(pool: Pool, rabbitmq_url: str, channel: AbstractChannel) -> None:
    """Also an action that could not start."""

    def fail(_: str) -> None:
        raise BrokerUnavailable("rabbitmq: the connection was lost")

    await put_many(channel, 1)
    letters = in_queue(pool, rabbitmq_url, signals=Signals(fail))
    with pytest.raises(BrokerUnavailable):
        await go_over(letters, DeadLetterAction.REPLAY)
    await holds(channel, 1)
    with pytest.raises(BrokerUnavailable):
        await go_over(in_queue(pool, "amqp://127.0.0.1:1/"), DeadLetterAction.PURGE)
    assert await recorded(pool) == [f"dlq {action} failed: broker-unavailable" for action in ("replay", "purge")]

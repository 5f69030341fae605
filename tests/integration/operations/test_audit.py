"""The audit log, as `GET /ops/actions` and `orders audit` show it: one reading, newest first."""

import json
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import httpx
import pytest

from app.db import Pool
from app.errors import SagaNotRetriable
from app.operations import audit, outbox
from app.operations.audit_views import ActionsAnswer, ActionTarget
from tests.harness.api import assert_problem, serving
from tests.harness.commands import orders
from tests.harness.identity import bearer
from tests.harness.operating import OPERATOR, compensate, retry
from tests.harness.orders import placed, start_saga

TOKEN = "a-token-of-the-operators"


@pytest.fixture
async def ops(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client."""
    async with serving(database_url, admin_token=TOKEN) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield client


async def read(ops: httpx.AsyncClient, **query: str | int) -> ActionsAnswer:
    answer = (await ops.get("/ops/actions", params=query)).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    return ActionsAnswer.model_validate(answer.json(), strict=True)


async def requeued(pool: Pool) -> tuple[UUID, UUID]:
    """Requeue a parked event of a new order; return its id and its order's."""
    order_id = (await placed(pool)).id
    query = """
        UPDATE outbox SET id = gen_random_uuid(), parked_at = clock_timestamp() WHERE subject = $1 RETURNING id
    """
    row_id = await pool.fetchval(query, str(order_id))
    await outbox.requeue(pool, row_id, OPERATOR)
    return row_id, order_id


async def replayed(pool: Pool, matched: int) -> None:
    """Record a replay of many messages."""
    async with audit.on_record(pool, OPERATOR, "dlq replay", None, {"since_seconds": 900}) as command:
        command.counts["matched"] = matched


async def test_only_an_operator_reads_the_log(api: httpx.AsyncClient, ops: httpx.AsyncClient) -> None:
    """Without the token the route is a 401, or a 404 where no operator is configured."""
    assert_problem(await api.get("/ops/actions"), 404, "not-found")
    assert_problem(await ops.get("/ops/actions", headers=bearer("x")), 401, "unauthorized")


async def test_every_kind_of_action_is_shown(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Each has its target, its outcome, and what was selected and counted; also one that was refused."""
    saga, unstarted = await start_saga(pool), (await placed(pool)).id
    await compensate(pool, saga)
    with pytest.raises(SagaNotRetriable):
        await retry(pool, unstarted)
    row_id, order_id = await requeued(pool)
    await replayed(pool, 7)
    actions = (await read(ops)).actions
    assert [(each.action, each.outcome, each.order_id and UUID(each.order_id)) for each in actions] == [
        ("dlq replay", "done", None),
        ("outbox requeue", "pending", order_id),
        ("retry", "refused", unstarted),
        ("compensate", "turns-back", saga),
    ]
    assert [each.target for each in actions] == [
        ActionTarget(kind="messages", id=None),
        ActionTarget(kind="message", id=str(row_id)),
        ActionTarget(kind="order", id=str(unstarted)),
        ActionTarget(kind="order", id=str(saga)),
    ]
    assert (actions[0].selection, actions[0].counts) == ({"since_seconds": 900}, {"matched": 7})
    assert (actions[1].selection, actions[1].counts) == ({"id": str(row_id)}, None)
    assert {(each.actor, each.reason) for each in actions} == {(OPERATOR.name, OPERATOR.reason)}
    assert [each.id for each in actions] == sorted((each.id for each in actions), reverse=True)


async def test_pages_contain_each_action_once(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Also if actions are recorded between two pages. The last page has no cursor."""
    for number in range(5):
        await replayed(pool, number)
    found: list[int] = []
    cursors: list[str | None] = []
    page = await read(ops, limit=2)
    while True:
        found += [each.counts["matched"] for each in page.actions if each.counts]
        cursors.append(page.next_cursor)
        if page.next_cursor is None:
            break
        await replayed(pool, 99)
        page = await read(ops, limit=2, cursor=page.next_cursor)
    assert found == [4, 3, 2, 1, 0]
    assert [cursor is None for cursor in cursors] == [False, False, True]


async def test_the_log_is_filtered(ops: httpx.AsyncClient, database_url: str, pool: Pool) -> None:
    """By order and by age, together too, and by command as by route."""
    old, new = await start_saga(pool), await start_saga(pool)
    for saga in (old, new):
        await compensate(pool, saga)
        await retry(pool, saga)
    await pool.execute("UPDATE operator_actions SET at = at - interval '2 h' WHERE order_id = $1", old)
    every = [("retry", new), ("compensate", new), ("retry", old), ("compensate", old)]
    for query, expected in (
        ({}, every),
        ({"order": str(old)}, every[2:]),
        ({"since": "1h"}, every[:2]),
        ({"since": "999999999d"}, every),
        ({"order": str(old), "since": "90m"}, []),
        ({"order": str(new), "limit": "1"}, every[:1]),
        ({"order": str(uuid4())}, []),
    ):
        shown = await read(ops, **query)
        assert [(each.action, each.order_id) for each in shown.actions] == [(name, str(id_)) for name, id_ in expected]
        options = [part for name, value in query.items() for part in (f"--{name}", value)]
        code, out, err = await orders("audit", "--json", *options, database_url=database_url)
        assert (code, err, ActionsAnswer.model_validate_json(out)) == (0, "", shown)


@pytest.mark.parametrize(
    "query",
    [{"order": "seven"}, {"since": "soon"}, {"limit": "0"}, {"cursor": "0"}, {"cursor": "1" * 19}, {"who": "ada"}],
    ids=str,
)
async def test_an_invalid_query_is_refused(ops: httpx.AsyncClient, query: dict[str, str]) -> None:
    assert_problem(await ops.get("/ops/actions", params=query), 422, "validation-failed")


async def test_the_command_prints_each_action(database_url: str, pool: Pool) -> None:
    """Lines for people: what was done to what, by whom and why; the exit code is 2 for a bad option."""
    assert await orders("audit", database_url=database_url) == (0, "0 actions shown\n", "")
    row_id, order_id = await requeued(pool)
    await replayed(pool, 7)
    code, out, err = await orders("audit", database_url=database_url)
    assert (code, err) == (0, "")
    times = [
        row["at"] for row in json.loads((await orders("audit", "--json", database_url=database_url))[1])["actions"]
    ]
    assert out.splitlines() == [
        "2 actions shown",
        "",
        f"{times[0]}  dlq replay: done",
        "  target    messages",
        f"  actor     {OPERATOR.name}",
        f"  reason    {OPERATOR.reason}",
        "  selected  since_seconds 900",
        "  counted   matched 7",
        "",
        f"{times[1]}  outbox requeue: pending",
        f"  target    message {row_id}",
        f"  actor     {OPERATOR.name}",
        f"  reason    {OPERATOR.reason}",
        f"  order     {order_id}",
        f'  selected  id "{row_id}"',
    ]
    _, out, _ = await orders("audit", "--limit", "1", database_url=database_url)
    assert out.startswith("1 actions shown, and there are older ones\n")
    for options in (("--order", "seven"), ("--since", "soon"), ("--limit", "0")):
        assert (await orders("audit", *options, database_url=database_url))[0] == 2

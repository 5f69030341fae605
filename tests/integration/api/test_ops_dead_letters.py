"""`/ops/dlq` and requeueing over HTTP, for operators only."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool
from app.operations.dead_letter_views import DeadLettersAnswer, TreatedAnswer
from tests.harness.api import assert_problem, serving
from tests.harness.dead_letters import REASON, drained, holds, put_many, scan
from tests.harness.orders import placed
from tests.harness.queues import QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

TOKEN = "a-token-of-the-operators"
SOME_ID = "01890a5d-ac97-7001-8000-000000000000"
ROUTES = (
    ("GET", "/ops/dlq"),
    ("POST", "/ops/dlq/replay"),
    ("POST", "/ops/dlq/purge"),
    ("POST", f"/ops/outbox/{SOME_ID}/requeue"),
    ("POST", "/ops/outbox/seven/requeue"),
)


@pytest.fixture
async def ops(database_url: str, rabbitmq_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client of a service with a broker."""
    async with serving(database_url, rabbitmq_url=rabbitmq_url, admin_token=TOKEN) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield client


async def treat(ops: httpx.AsyncClient, action: str, **body: Any) -> TreatedAnswer:
    answer = (await ops.post(f"/ops/dlq/{action}", json=body)).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    return TreatedAnswer.model_validate(answer.json(), strict=True)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_only_an_operator_is_let_in(
    api: httpx.AsyncClient, ops: httpx.AsyncClient, method: str, path: str
) -> None:
    """Without the token each route is a 401, or a 404 where no operator is configured."""
    assert_problem(await api.request(method, path), 404, "not-found")
    assert_problem(await ops.request(method, path, headers={"Authorization": "Bearer x"}), 401, "unauthorized")
    del ops.headers["Authorization"]
    assert_problem(await ops.request(method, path), 401, "unauthorized")


async def test_dead_letters_are_shown_replayed_and_purged(ops: httpx.AsyncClient, channel: AbstractChannel) -> None:
    """The routes do what the commands do, with the same selectors."""
    expected = await put_many(channel, 5)
    answer = (await ops.get("/ops/dlq", params={"limit": 2, "since": "15m"})).raise_for_status()
    shown = DeadLettersAnswer.model_validate(answer.json(), strict=True)
    assert (shown.queue, shown.depth, shown.looked_at) == (QUEUE, 5, 2)
    assert [each.id for each in shown.dead_letters] == expected[:2]
    assert (shown.dead_letters[0].reason, shown.dead_letters[0].inbox) == (REASON, "never seen")
    await holds(channel, 5)
    dry = await treat(ops, "replay", dry_run=True)
    assert (dry.dry_run, dry.done, len(dry.dead_letters)) == (True, 5, 5)
    await holds(channel, 5)
    assert (await treat(ops, "replay", id=expected[3])).done == 1
    await holds(channel, 4)
    assert (await treat(ops, "replay", id=expected[3])).done == 0
    await holds(channel, 4)
    assert (await treat(ops, "replay", limit=1)).done == 1
    await holds(channel, 3)
    assert (await treat(ops, "purge", queue="orders.saga.dlq")).done == 3
    await holds(channel, 0)
    assert await drained(channel, QUEUE) == [expected[3], expected[0]]


@pytest.mark.parametrize("content", [b"", b" ", b"{}"])
async def test_without_selectors_all_are_selected(
    ops: httpx.AsyncClient, channel: AbstractChannel, content: bytes
) -> None:
    """No body, a blank body and `{}` select all dead letters."""
    await put_many(channel, 2)
    answer = await ops.post("/ops/dlq/purge", content=content, headers={"Content-Type": "application/json"})
    assert answer.json()["done"] == 2


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "malformed-request"),
        (b"[]", 422, "validation-failed"),
        (b"1.5", 422, "validation-failed"),
        (b"null", 422, "validation-failed"),
        (b'{"since": "soon"}', 422, "validation-failed"),
        (b'{"since": 900}', 422, "validation-failed"),
        (b'{"id": "\\u0000"}', 422, "validation-failed"),
        (b'{"id": ""}', 422, "validation-failed"),
        (b'{"limit": 1001}', 422, "validation-failed"),
        (b'{"limit": true}', 422, "validation-failed"),
        (b'{"queue": "orders.other"}', 422, "validation-failed"),
        (b'{"queue": {}}', 422, "validation-failed"),
        (b'{"dry_run": "yes"}', 422, "validation-failed"),
        (b'{"sinse": "15m"}', 422, "validation-failed"),
        (b" " * 70_000, 413, "body-too-large"),
    ],
)
async def test_an_invalid_selection_changes_nothing(
    ops: httpx.AsyncClient, channel: AbstractChannel, content: bytes, status: int, code: str
) -> None:
    """It is refused with a 4xx, and every dead letter stays."""
    await put_many(channel, 1)
    answer = await ops.post("/ops/dlq/purge", content=content, headers={"Content-Type": "application/json"})
    assert_problem(answer, status, code)
    assert_problem(await ops.post("/ops/dlq/purge?since=15m"), 422, "validation-failed")
    await holds(channel, 1)


@pytest.mark.parametrize("query", ["limit=101", "since=0m", "since=15", "queue=x", "id=", "dry_run=true"])
async def test_an_invalid_query_is_refused(ops: httpx.AsyncClient, query: str) -> None:
    """A valid query is applied, every other one is a 422."""
    answer = await ops.get(f"/ops/dlq?{query}")
    if query == "since=15":
        assert answer.status_code == 200
    else:
        assert_problem(answer, 422, "validation-failed")


async def test_two_scans_at_a_time_are_refused(
    ops: httpx.AsyncClient, pool: Pool, channel: AbstractChannel, rabbitmq_url: str
) -> None:
    """The second one is a 409 with Retry-After."""
    await put_many(channel, 1)
    async with scan(pool, rabbitmq_url):
        answer = await ops.get("/ops/dlq")
    assert_problem(answer, 409, "dead-letters-busy")
    assert answer.headers["retry-after"]


async def test_an_unavailable_broker_is_a_503(database_url: str) -> None:
    """Each route that needs the broker answers with Retry-After."""
    async with serving(database_url, rabbitmq_url="amqp://127.0.0.1:1/", admin_token=TOKEN) as api:
        for method, path in ROUTES[:3]:
            answer = await api.request(method, path, headers={"Authorization": f"Bearer {TOKEN}"})
            assert_problem(answer, 503, "broker-unavailable")
            assert answer.headers["retry-after"]


async def test_a_parked_row_is_requeued_once(ops: httpx.AsyncClient, pool: Pool) -> None:
    """A second request, or an unknown id, is a 404."""
    await placed(pool)
    row_id = await pool.fetchval("UPDATE outbox SET parked_at = clock_timestamp(), attempts = 10 RETURNING id")
    answer = await ops.post(f"/ops/outbox/{row_id}/requeue")
    assert (answer.status_code, answer.json()) == (200, {"id": str(row_id)})
    assert tuple(await pool.fetchrow("SELECT parked_at, attempts FROM outbox") or ()) == (None, 0)
    for unknown in (row_id, uuid4()):
        assert_problem(await ops.post(f"/ops/outbox/{unknown}/requeue"), 404, "parked-row-not-found")
    assert_problem(await ops.post("/ops/outbox/seven/requeue"), 422, "validation-failed")


async def test_without_a_broker_a_replayed_row_is_handled_at_once(
    database_url: str, pool: Pool, sandbox_url: str
) -> None:
    """The relay polls once an hour: the replay wakes it."""
    await placed(pool)
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp(), last_error = 'x', attempts = 10")
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    settings = {"roles": "api,relay,consumer", "outbox_poll_seconds": 3600, "admin_token": TOKEN}
    async with serving(database_url, **settings, **urls) as api:
        api.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await treat(api, "replay")).done == 1

        async def confirmed() -> bool:
            return bool(await pool.fetchval("SELECT status = 'confirmed' FROM orders"))

        await wait_until(confirmed, AMPLE_SECONDS, "end of the order")

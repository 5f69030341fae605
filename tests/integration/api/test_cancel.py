"""`POST /orders/{id}/cancel` over a real socket: every status, once per key, and the wake-ups it causes."""

import asyncio
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from app.db import Pool
from app.idempotency.key import IdempotencyKey
from app.saga import start
from chaos.proxy import postgres
from chaos.proxy.faults import Lose
from chaos.proxy.proxy import Proxy
from tests.harness.api import assert_problem, serving
from tests.harness.cancelling import cancel as cancel_elsewhere
from tests.harness.cancelling import cancel_under_way
from tests.harness.orders import event_of, placed, request_under_way, start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

JSON = {"content-type": "application/json"}


async def cancel(api: httpx.AsyncClient, order_id: UUID, key: str | None = None, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {}) | ({} if key is None else {"Idempotency-Key": key})
    return await api.post(f"/orders/{order_id}/cancel", headers=headers, **more)


async def stored(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM idempotency_keys"))


async def status_of(pool: Pool, order_id: UUID) -> str:
    return str(await pool.fetchval("SELECT status FROM orders WHERE id = $1", order_id))


async def test_an_unstarted_order_is_cancelled_at_once(api: httpx.AsyncClient, pool: Pool) -> None:
    """Without a saga the order is cancelled, and the answer is 200."""
    order = await placed(pool)
    answer = await cancel(api, order.id)
    shown = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (200, f"/orders/{order.id}")
    assert (shown["status"], shown["status_reason"], shown["version"]) == ("cancelled", "cancelled-by-customer", 2)
    assert (await api.get(answer.headers["location"])).content == answer.content
    again = await cancel(api, order.id)
    assert (again.status_code, again.content, "idempotent-replay" in again.headers) == (200, answer.content, False)
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 2
    series = 'orders_finished_total{reason="cancelled-by-customer",status="cancelled"} 1.0'
    assert series in (await api.get("/metrics")).text


async def test_a_started_order_is_accepted_for_cancelling(api: httpx.AsyncClient, pool: Pool) -> None:
    """With a saga the answer is 202, and the cancellation is recorded."""
    order_id = await start_saga(pool)
    for _ in range(2):
        answer = await cancel(api, order_id)
        assert (answer.status_code, answer.headers["location"]) == (202, f"/orders/{order_id}")
        assert answer.content == (await api.get(f"/orders/{order_id}")).content
    assert await pool.fetchval("SELECT cancel_requested_at IS NOT NULL FROM orders")


async def test_a_compensating_order_is_accepted(api: httpx.AsyncClient, pool: Pool) -> None:
    """An order whose saga already compensates is answered with 202."""
    order_id = await start_saga(pool)
    await pool.execute("UPDATE orders SET status = 'compensating', status_reason = 'card-declined'")
    answer = await cancel(api, order_id)
    assert (answer.status_code, answer.json()["status"]) == (202, "compensating")
    assert answer.json()["status_reason"] == "card-declined"


@pytest.mark.parametrize("status", ["confirmed", "rejected"])
async def test_an_ended_order_is_not_cancellable(api: httpx.AsyncClient, pool: Pool, status: str) -> None:
    """A confirmed or rejected order is a 409, and the key can be used again."""
    order_id = await start_saga(pool)
    await pool.execute("UPDATE orders SET status = $1", status)
    refused = await cancel(api, order_id, "k")
    assert_problem(refused, 409, "order-not-cancellable")
    assert "retry-after" not in refused.headers
    assert await status_of(pool, order_id) == status
    assert await stored(pool) == 0


async def test_an_unknown_or_foreign_order_is_not_found(api: httpx.AsyncClient, pool: Pool) -> None:
    """An unknown order and another tenant's order are the same 404."""
    others = await placed(pool, tenant="other")
    for order_id in (uuid4(), others.id):
        assert_problem(await cancel(api, order_id, "k"), 404, "order-not-found")
    assert_problem(await api.post("/orders/no-uuid/cancel"), 422, "validation-failed")
    assert (await status_of(pool, others.id), await stored(pool)) == ("pending", 0)


@pytest.mark.parametrize("started", [False, True])
async def test_a_replay_equals_the_first_answer(api: httpx.AsyncClient, pool: Pool, started: bool) -> None:
    """A repeat gets the first response, even when the order has changed since."""
    order_id = await start_saga(pool) if started else (await placed(pool)).id
    first = await cancel(api, order_id, "k")
    assert first.status_code == (202 if started else 200)
    await pool.execute("UPDATE orders SET status = 'cancelled', version = 3")
    for key in ("k", '"k"'):
        again = await cancel(api, order_id, key, content=b"{}", headers=JSON)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert (again.headers["location"], again.headers["idempotent-replay"]) == (first.headers["location"], "true")


async def test_a_storm_of_one_cancel_is_one_answer_and_one_event(api: httpx.AsyncClient, pool: Pool) -> None:
    """Concurrent cancels with one key get one response and write one event."""
    order = await placed(pool)
    answers = await asyncio.gather(*(cancel(api, order.id, "k") for _ in range(30)))
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert [answer.headers.get("idempotent-replay") for answer in answers].count("true") == 29
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 2


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("frame", [postgres.COMMIT_REQUEST, postgres.COMMIT_ANSWER])
async def test_a_lost_commit_cancels_once(database_url: str, pool: Pool, frame: str, key: str | None) -> None:
    """When the answer to COMMIT is lost, the service finds out the outcome."""
    order, parts, fault = await placed(pool), urlsplit(database_url), Lose(frame, times=1)
    async with (
        Proxy(parts.hostname or "", parts.port or 0, frames=postgres) as proxy,
        serving(proxy.url(database_url)) as api,
    ):
        proxy.arm(fault)
        answer = await cancel(api, order.id, key)
        assert proxy.struck[fault] == 1
    assert (answer.status_code, answer.json()["version"], "idempotent-replay" in answer.headers) == (200, 2, False)
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 2


async def test_a_key_of_another_request_is_refused(api: httpx.AsyncClient, pool: Pool) -> None:
    """A key that was used for another request is a 422, and nothing changes."""
    one, other = await placed(pool), await placed(pool)
    await cancel(api, one.id, "k")
    assert_problem(await cancel(api, other.id, "k"), 422, "idempotency-key-reused")
    line = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
    placing = await api.post("/orders", json=line, headers={"Idempotency-Key": "k"})
    assert_problem(placing, 422, "idempotency-key-reused")
    assert await status_of(pool, other.id) == "pending"


async def test_keys_follow_the_rules_of_every_write(api: httpx.AsyncClient, pool: Pool, database_url: str) -> None:
    """Malformed, missing and busy keys are answered as in `POST /orders`."""
    order = await placed(pool)
    assert_problem(await cancel(api, order.id, "two words"), 400, "idempotency-key-invalid")
    async with serving(database_url, idempotency_required=True, idempotency_wait_seconds=0.05) as strict:
        assert_problem(await cancel(strict, order.id), 400, "idempotency-key-missing")
        async with request_under_way(pool, IdempotencyKey("default", "k", b"", 1)):
            waiting = await cancel(strict, order.id, "k")
            assert_problem(waiting, 409, "request-in-progress")
            assert int(waiting.headers["retry-after"]) > 0
        assert (await cancel(strict, order.id, "k")).status_code == 200


FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("content", "headers"), [(None, {}), (b"", {}), (b"", JSON), (b"", FORM), (b"{}", JSON), (b" {\n} ", {})]
)
async def test_an_empty_body_is_accepted(
    api: httpx.AsyncClient, pool: Pool, content: bytes | None, headers: dict[str, str]
) -> None:
    """No body, an empty body and `{}` are all accepted."""
    order = await placed(pool)
    assert (await cancel(api, order.id, content=content, headers=headers)).status_code == 200


@pytest.mark.parametrize("content", [b'{"reason": "no"}', b"[]", b"null", b"0", b'""', b"{", b"\n", b"\xff"])
async def test_any_other_body_is_refused(api: httpx.AsyncClient, pool: Pool, content: bytes) -> None:
    """Any other body is a 422, and nothing changes."""
    order = await placed(pool)
    assert_problem(await cancel(api, order.id, "k", content=content, headers=JSON), 422, "validation-failed")
    assert (await status_of(pool, order.id), await stored(pool)) == ("pending", 0)


async def test_a_body_of_another_type_or_size_is_refused(api: httpx.AsyncClient, pool: Pool) -> None:
    """Another media type is a 415, a body beyond the limit a 413."""
    order = await placed(pool)
    assert_problem(await cancel(api, order.id, content=b"a=1", headers=FORM), 415, "unsupported-media-type")
    large = await cancel(api, order.id, content=b" " * 100_000, headers=JSON)
    assert_problem(large, 413, "body-too-large")
    assert await status_of(pool, order.id) == "pending"


async def test_only_posts_cancel(api: httpx.AsyncClient, pool: Pool) -> None:
    """Every other method is a 405."""
    order = await placed(pool)
    assert_problem(await api.get(f"/orders/{order.id}/cancel"), 405, "method-not-allowed")
    assert await status_of(pool, order.id) == "pending"


async def test_a_locked_order_is_a_503(database_url: str, api: httpx.AsyncClient, pool: Pool) -> None:
    """A cancel that cannot lock the order in time is a 503 with Retry-After."""
    order = await placed(pool)
    async with cancel_under_way(pool, order.id), serving(database_url, idempotency_wait_seconds=0.05) as impatient:
        refused = await cancel(impatient, order.id, "k")
        assert_problem(refused, 503, "database-unavailable")
        assert int(refused.headers["retry-after"]) > 0
    assert (await cancel(api, order.id, "k")).status_code == 200


async def test_a_cancel_wakes_the_sagas_of_its_process(database_url: str, pool: Pool, sandbox_url: str) -> None:
    """The saga of a cancelled order runs without waiting for the next poll."""
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    idle = {"saga_poll_seconds": 60, "outbox_poll_seconds": 60}  # no poll happens before the test ends
    order_id = await start_saga(pool)
    await pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")  # the saga pauses
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")  # a delivery would wake the saga too

    async def the_end_is_told() -> bool:
        query = "SELECT count(*) FROM outbox WHERE type LIKE '%cancelled%' AND published_at IS NOT NULL"
        return bool(await pool.fetchval(query))

    async with serving(database_url, roles="api,relay,consumer", **partners, **idle) as api:
        assert (await cancel(api, order_id)).status_code == 202
        await wait_until(the_end_is_told, AMPLE_SECONDS, "the event of the end")
    assert await status_of(pool, order_id) == "cancelled"


async def test_a_late_start_finds_the_order_cancelled(api: httpx.AsyncClient, pool: Pool) -> None:
    """A consumer that starts the saga after the cancel changes nothing."""
    order = await placed(pool)
    await cancel(api, order.id)
    async with pool.acquire() as conn, conn.transaction():
        await start.handle_order_placed(conn, [event_of(order)], 900)
    assert await pool.fetchval("SELECT count(*) FROM sagas") == 0
    assert (await cancel_elsewhere(pool, order.id)).status == "cancelled"

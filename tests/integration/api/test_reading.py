"""`GET /orders/{id}`: conditional, and with a wait until the order has ended."""

import asyncio
import contextlib
from uuid import UUID, uuid4

import httpx
import pytest

from app import db
from app.api.orders.long_poll import Waiters
from app.observability.signals import Signals
from tests.harness.api import assert_problem, serving
from tests.harness.databases import patient_pool
from tests.harness.orders import placed, start_saga
from tests.harness.sagas import Stage
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

CACHING = {"cache-control": "private, no-cache", "vary": "Prefer"}
LONG = {"Prefer": "wait=30"}
TOKEN = "a-token-of-the-operators"


async def confirm(pool: db.Pool, order_id: UUID) -> None:
    """End the order as another process does, without a wake-up in this one."""
    await pool.execute("UPDATE orders SET status = 'confirmed', version = 2 WHERE id = $1", order_id)


async def in_the_metrics(api: httpx.AsyncClient, status: str) -> bool:
    series = (
        f'http_server_request_duration_seconds_count{{method="GET",route="/orders/{{order_id}}",status="{status}"}}'
    )
    return series in (await api.get("/metrics")).text


async def test_an_order_has_a_strong_etag_of_its_version(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """Each version of an order has another ETag."""
    order = await placed(pool)
    first = await api.get(f"/orders/{order.id}")
    again = await api.get(f"/orders/{order.id}")
    await confirm(pool, order.id)
    changed = await api.get(f"/orders/{order.id}")
    assert first.headers["etag"] == again.headers["etag"] != changed.headers["etag"]
    assert [each.headers["etag"][0] for each in (first, changed)] == ['"', '"']
    assert {name: first.headers[name] for name in CACHING} == CACHING
    assert "preference-applied" not in first.headers


async def test_a_newer_reason_is_shown_unchanged(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """A reason that a newer release wrote is shown as it is."""
    order = await placed(pool)
    query = "UPDATE orders SET status = 'rejected', status_reason = 'of-a-newer-release', version = 3 WHERE id = $1"
    await pool.execute(query, order.id)
    answer = (await api.get(f"/orders/{order.id}")).raise_for_status().json()
    assert (answer["status"], answer["status_reason"]) == ("rejected", "of-a-newer-release")
    assert answer in (await api.get("/orders")).raise_for_status().json()["orders"]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"x", {}', "*"])
async def test_a_current_version_is_a_304(api: httpx.AsyncClient, pool: db.Pool, form: str) -> None:
    """The answer has the headers of the 200, and no body."""
    path = f"/orders/{(await placed(pool)).id}"
    tag = (await api.get(path)).headers["etag"]
    answer = await api.get(path, headers={"If-None-Match": form.format(tag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert {name: answer.headers[name] for name in ("etag", *CACHING)} == {"etag": tag, **CACHING}
    assert answer.headers["date"]
    assert answer.headers["x-request-id"]
    assert "content-type" not in answer.headers


async def test_an_older_version_gets_the_current_one(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """An outdated ETag is answered in full."""
    order = await placed(pool)
    tag = (await api.get(f"/orders/{order.id}")).headers["etag"]
    await confirm(pool, order.id)
    answer = await api.get(f"/orders/{order.id}", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json()["status"]) == (200, "confirmed")


async def test_a_condition_on_an_unknown_order_is_a_404(api: httpx.AsyncClient) -> None:
    """An unknown order is a 404, also with `*` and with a wait."""
    headers = {"If-None-Match": "*", **LONG}
    assert_problem(await api.get(f"/orders/{uuid4()}", headers=headers), 404, "order-not-found")


async def test_an_order_of_another_tenant_is_not_waited_for(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """The 404 comes at once."""
    order = await placed(pool, tenant="other")
    assert_problem(await api.get(f"/orders/{order.id}", headers=LONG), 404, "order-not-found")


async def test_a_wait_ends_when_another_process_ends_the_order(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """A poll finds the end within a moment."""
    orders = [await placed(pool) for _ in range(3)]
    waiting = [asyncio.create_task(api.get(f"/orders/{order.id}", headers=LONG)) for order in orders for _ in range(2)]
    for order in orders:
        await confirm(pool, order.id)
    answers = await asyncio.gather(*waiting)
    assert {answer.json()["status"] for answer in answers} == {"confirmed"}
    assert {answer.headers["preference-applied"] for answer in answers} == {"wait=30"}


async def test_an_order_that_has_ended_is_answered_at_once(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """The wait is capped at 30 s, and does not delay the answer."""
    order = await placed(pool)
    await confirm(pool, order.id)
    answer = await api.get(f"/orders/{order.id}", headers={"Prefer": "wait=3600"})
    assert (answer.json()["status"], answer.headers["preference-applied"]) == ("confirmed", "wait=30")


@pytest.mark.parametrize("seconds", [0, 1])
async def test_after_the_wait_the_order_is_returned_as_it_is(
    api: httpx.AsyncClient, pool: db.Pool, seconds: int
) -> None:
    """`Preference-Applied` has the seconds of the preference."""
    order = await placed(pool)
    answer = await api.get(f"/orders/{order.id}", headers={"Prefer": f"wait={seconds}"})
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")
    assert answer.headers["preference-applied"] == f"wait={seconds}"


async def test_a_condition_is_evaluated_after_the_wait(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """The ETag is compared with the order that would be returned."""
    order = await placed(pool)
    tag = (await api.get(f"/orders/{order.id}")).headers["etag"]
    unchanged = await api.get(f"/orders/{order.id}", headers={"If-None-Match": tag, "Prefer": "wait=1"})
    assert (unchanged.status_code, unchanged.headers["preference-applied"]) == (304, "wait=1")
    waiting = asyncio.create_task(api.get(f"/orders/{order.id}", headers={"If-None-Match": tag, **LONG}))
    await confirm(pool, order.id)
    assert (await waiting).json()["status"] == "confirmed"


async def test_a_waiter_holds_no_database_connection(database_url: str, pool: db.Pool) -> None:
    """With one connection for all requests, twenty requests wait while others are answered."""
    order = await placed(pool)
    async with serving(database_url, database_pool_size=1) as api:
        waiting = [asyncio.create_task(api.get(f"/orders/{order.id}", headers=LONG)) for _ in range(20)]
        other = await placed(pool)
        for _ in range(20):
            assert (await api.get(f"/orders/{other.id}")).status_code == 200
        await confirm(pool, order.id)
        assert {answer.json()["status"] for answer in await asyncio.gather(*waiting)} == {"confirmed"}


async def test_a_client_that_disconnects_ends_its_wait(api: httpx.AsyncClient, pool: db.Pool) -> None:
    """The request is counted with status 499."""
    order = await placed(pool)
    _, writer = await asyncio.open_connection("127.0.0.1", api.base_url.port)
    writer.write(f"GET /orders/{order.id} HTTP/1.1\r\nHost: here\r\nPrefer: wait=30\r\n\r\n".encode())
    await writer.drain()
    writer.transport.abort()
    await wait_until(lambda: in_the_metrics(api, "499"), AMPLE_SECONDS, "the request in the metrics")


async def test_a_stopping_process_answers_its_waiters(database_url: str, pool: db.Pool) -> None:
    """Waiting requests get the order as it is."""
    order = await placed(pool)
    async with contextlib.AsyncExitStack() as until_answered:
        async with serving(database_url, shutdown_timeout_seconds=2 * AMPLE_SECONDS) as api:
            patient = await until_answered.enter_async_context(plain_http(str(api.base_url)))
            waiting = asyncio.create_task(patient.get(f"/orders/{order.id}", headers=LONG))
            await wait_until(lambda: has_polled(pool), AMPLE_SECONDS, "a poll for the waiters")
        answer = await waiting
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")


async def has_polled(pool: db.Pool) -> bool:
    """Return whether the table was scanned more often than placing and reading the order needs: by polls."""
    looks = "SELECT coalesce(seq_scan, 0) + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'orders'"
    return bool(await pool.fetchval(looks) > 6)


async def test_beyond_capacity_a_request_does_not_wait(pool: db.Pool) -> None:
    """A registration that ends makes room for another, and after `answer_all` there are none."""
    waiters = Waiters(pool, Signals(), capacity=2)
    first, second = uuid4(), uuid4()
    with waiters.register(first) as one, waiters.register(first) as two:
        assert one is not None
        assert two is not None
        with waiters.register(second) as none:
            assert none is None
    with waiters.register(second) as place:
        assert place is not None
    waiters.answer_all()
    with waiters.register(second) as none:
        assert none is None


async def test_all_waiters_share_one_query(pool: db.Pool, database_url: str) -> None:
    """Without waiters there is no query."""
    orders = [await placed(pool) for _ in range(5)]
    asked: list[str] = []

    async with patient_pool(database_url, 1) as heard:
        async with db.connection(heard) as conn:
            conn.add_query_logger(lambda query: asked.append(query.query))
        waiters = Waiters(heard, Signals())
        await waiters.run_once()
        assert asked == []
        with contextlib.ExitStack() as places:
            events = [places.enter_context(waiters.register(order.id)) for order in orders for _ in range(3)]
            await confirm(pool, orders[0].id)
            await waiters.run_once()
            assert [event is not None and event.is_set() for event in events] == [True] * 3 + [False] * 12
    assert len([query for query in asked if "orders" in query]) == 1


async def test_an_end_in_this_process_wakes_its_waiters(stage: Stage) -> None:
    """Its waiters do not wait for the next poll, and other waiters are not woken."""
    waiters = Waiters(stage.pool, stage.signals, poll_seconds=3600)
    saga = await start_saga(stage.pool)
    with waiters.register(saga) as ended, waiters.register(uuid4()) as other:
        assert ended is not None
        assert other is not None
        await stage.orchestrator(on_finished=waiters.wake).run_once()
        assert ended.is_set()
        assert not other.is_set()
    assert await stage.outcome(saga) == "confirmed"


async def test_head_is_get_without_a_body(database_url: str, pool: db.Pool) -> None:
    """HEAD has the status and headers of GET on every path, as proxies and health checks expect."""
    order = f"/orders/{(await placed(pool)).id}"
    paths = ["/livez", "/readyz", "/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"]
    paths += ["/orders", order, "/idempotency-keys/none", "/nowhere", "/ops/sagas"]
    async with serving(database_url, admin_token=TOKEN) as api:
        api.headers["Authorization"] = f"Bearer {TOKEN}"
        for path in paths:
            got, head = await api.get(path), await api.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            changing = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
            assert {name for name in got.headers if got.headers[name] != head.headers.get(name)} <= changing, path
        known = await api.head(order, headers={"If-None-Match": (await api.get(order)).headers["etag"]})
        assert known.status_code == 304
        refused = await api.head(f"{order}/cancel")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert (await api.put(order)).headers["allow"] == "GET, HEAD"
        assert 'method="HEAD",route="/livez",status="200"' in (await api.get("/metrics")).text

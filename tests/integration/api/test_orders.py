"""`POST /orders` and `GET /orders/{id}` over a real socket, with answers compared byte for byte."""

import asyncio
import json
import re
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.db import Pool
from app.idempotency.key import IdempotencyKey
from tests.harness.api import assert_problem, serving
from tests.harness.orders import request_under_way

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
FULL = {
    "items": [LINE, {"sku": "GADGET", "quantity": 1, "unit_price": 5}],
    "currency": "EUR",
    "customer_id": "cus_1",
    "payment_method": "pm_card_visa",
    "shipping_address": {"name": "Ada", "line1": "1 Main St", "city": "Oslo", "country": "NO"},
    "metadata": {"note": "grüße"},
}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def place(api: httpx.AsyncClient, key: str | None = None, body: Any = LINE, **headers: str) -> httpx.Response:
    return await api.post("/orders", json=body, headers=headers if key is None else {"Idempotency-Key": key, **headers})


async def test_an_order_is_answered_in_full(api: httpx.AsyncClient) -> None:
    """The 201 shows every field of the order."""
    answer = await place(api, body=FULL)
    assert (answer.status_code, answer.headers["content-type"]) == (201, "application/json")
    assert "idempotent-replay" not in answer.headers
    order = answer.json()
    assert answer.headers["location"] == f"/orders/{order['id']}"
    assert UUID(order["id"]).version == 7
    assert RFC3339.fullmatch(order["placed_at"])
    assert order == {
        "id": order["id"],
        "status": "pending",
        "status_reason": None,
        "customer_id": "cus_1",
        "currency": "EUR",
        "items": [
            {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99", "line_total": "29.97"},
            {"sku": "GADGET", "quantity": 1, "unit_price": "5.00", "line_total": "5.00"},
        ],
        "total": "34.97",
        "placed_at": order["placed_at"],
        "updated_at": order["placed_at"],
        "version": 1,
        "tracking_id": None,
    }


async def test_ids_are_ordered_by_time(api: httpx.AsyncClient) -> None:
    """A later order has a greater id."""
    ids = [(await place(api)).json()["id"] for _ in range(5)]
    assert ids == sorted(ids)


async def test_the_request_is_stored(api: httpx.AsyncClient, pool: Pool) -> None:
    """The rows have what the request says, and the event has its trace."""
    await place(api, body=FULL, traceparent=TRACEPARENT)
    order = await pool.fetchrow("SELECT * FROM orders")
    assert order is not None
    assert json.loads(order["metadata"]) == FULL["metadata"]
    assert json.loads(order["shipping_address"])["country"] == "NO"
    assert (order["tenant"], order["payment_method"], order["total_minor"]) == ("default", "pm_card_visa", 3497)
    assert await pool.fetchval("SELECT traceparent FROM outbox") == TRACEPARENT


async def test_an_order_is_read_in_its_current_state(api: httpx.AsyncClient, pool: Pool) -> None:
    """A GET returns the answer of the POST, and later the changed order."""
    placed = await place(api, body=FULL)
    read = await api.get(placed.headers["location"])
    assert (read.status_code, read.content) == (200, placed.content)
    await pool.execute("UPDATE orders SET status = 'confirmed', tracking_id = 'trk_1', version = 2, updated_at = now()")
    now = (await api.get(placed.headers["location"])).json()
    assert (now["status"], now["tracking_id"], now["version"]) == ("confirmed", "trk_1", 2)
    assert datetime.fromisoformat(now["updated_at"]) >= datetime.fromisoformat(now["placed_at"])


async def test_an_unknown_order_is_not_found(api: httpx.AsyncClient, pool: Pool) -> None:
    """A GET of an unknown id is a 404."""
    assert_problem(await api.get(f"/orders/{uuid4()}"), 404, "order-not-found")
    location = (await place(api)).headers["location"]
    await pool.execute("UPDATE orders SET tenant = 'other'")
    assert_problem(await api.get(location), 404, "order-not-found")


@pytest.mark.parametrize("given", ["abc", "!" * 128, "271fc92a-ce8b-47aa-b0bb-f00b1a94ab76"])
async def test_a_request_id_is_echoed(api: httpx.AsyncClient, given: str) -> None:
    """A valid X-Request-ID comes back in the response."""
    for path in ("/livez", "/orders/none", "/nowhere"):
        assert (await api.get(path, headers={"X-Request-ID": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "!" * 129, "é"])
async def test_a_request_without_a_usable_id_gets_one(api: httpx.AsyncClient, given: str | None) -> None:
    """A missing or invalid X-Request-ID is replaced by a new one."""
    headers = {} if given is None else {"X-Request-ID": given.encode()}
    ids = [(await api.get("/livez", headers=headers)).headers["x-request-id"] for _ in range(2)]  # type: ignore[arg-type]
    assert len({UUID(made) for made in ids}) == 2


async def test_a_replay_equals_the_first_answer(api: httpx.AsyncClient, pool: Pool) -> None:
    """A repeated request gets the first response, byte for byte."""
    first = await place(api, "k", FULL)
    await pool.execute("UPDATE orders SET status = 'confirmed', version = 2")
    for key in ("k", '"k"'):
        again = await place(api, key, FULL)
        assert (again.status_code, again.content) == (201, first.content)
        assert (again.headers["location"], again.headers["idempotent-replay"]) == (first.headers["location"], "true")
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_another_spelling_is_the_same_request(api: httpx.AsyncClient) -> None:
    """Another spelling of the same order under the same key is a replay."""
    first = await place(api, "k")
    for body in ({"items": [LINE], "currency": "USD"}, {"sku": "WIDGET", "quantity": 3, "unitPrice": 9.990}):
        assert (await place(api, "k", body)).content == first.content


async def test_a_storm_of_one_request_is_one_order(api: httpx.AsyncClient, pool: Pool) -> None:
    """Many concurrent requests with one key create one order."""
    answers = await asyncio.gather(*(place(api, "k") for _ in range(30)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replay") for answer in answers].count("true") == 29
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


@pytest.mark.parametrize("other", [LINE | {"quantity": 4}, LINE | {"currency": "EUR"}])
async def test_a_key_of_another_request_is_refused(api: httpx.AsyncClient, pool: Pool, other: dict[str, Any]) -> None:
    """A key that was used for another request is a 422, and nothing changes."""
    first = await place(api, "k")
    assert_problem(await place(api, "k", other), 422, "idempotency-key-reused")
    assert_problem(
        await api.post("/orders?x=1", json=LINE, headers={"Idempotency-Key": "k"}), 422, "idempotency-key-reused"
    )
    assert (await place(api, "k")).content == first.content
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_a_refused_request_leaves_its_key_free(api: httpx.AsyncClient) -> None:
    """A key can be used again after its request was refused."""
    assert_problem(await place(api, "k", LINE | {"quantity": 0}), 422, "validation-failed")
    assert "idempotent-replay" not in (await place(api, "k")).headers


async def test_an_expired_key_is_free_again(api: httpx.AsyncClient, pool: Pool) -> None:
    """A key can be used for another request once it has expired."""
    first = await place(api, "k")
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    second = await place(api, "k", LINE | {"quantity": 4})
    assert (second.status_code, second.json()["id"] == first.json()["id"]) == (201, False)


async def test_a_blank_key_counts_as_no_key(api: httpx.AsyncClient, database_url: str) -> None:
    """A blank key is ignored, or refused where a key is required."""
    for key in ("", '""', None):
        assert len({(await place(api, key)).json()["id"] for _ in range(2)}) == 2
    async with serving(database_url, idempotency_required=True) as strict:
        for key in ("", '""', None):
            assert_problem(await place(strict, key), 400, "idempotency-key-missing")
        assert (await place(strict, "k")).status_code == 201


async def test_a_request_in_progress_is_a_409_with_retry_after(database_url: str, pool: Pool) -> None:
    """A repeat whose first request is still running gets a 409 after the wait."""
    async with serving(database_url, idempotency_wait_seconds=0.05) as api:
        async with request_under_way(pool, IdempotencyKey("default", "k", b"", 1)):
            answer = await place(api, "k")
            assert_problem(answer, 409, "request-in-progress")
            assert int(answer.headers["retry-after"]) > 0
            assert (await place(api, "other")).status_code == 201
        assert (await place(api, "k")).status_code == 201


async def test_requests_are_counted_by_status(api: httpx.AsyncClient) -> None:
    """The metrics count by method, route and status, and never contain an id."""
    location = (await place(api, "k")).headers["location"]
    await place(api, "k")
    await place(api, "k", FULL)
    await api.get(location)
    await api.get("/nowhere")
    told = (await api.get("/metrics")).text
    duration = "http_server_request_duration_seconds_count"
    for line in (
        "orders_placed_total 1.0",
        'idempotency_cache_hits_total{source="memory"} 1.0',
        'idempotency_conflicts_total{kind="reused"} 1.0',
        f'{duration}{{method="POST",route="/orders",status="201"}} 2.0',
        f'{duration}{{method="POST",route="/orders",status="422"}} 1.0',
        f'{duration}{{method="GET",route="/orders/{{order_id}}",status="200"}} 1.0',
        f'{duration}{{method="GET",route="unmatched",status="404"}} 1.0',
    ):
        assert line in told
    assert location.rpartition("/")[2] not in told

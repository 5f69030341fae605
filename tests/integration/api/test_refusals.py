"""Bad input over a real socket: each is one clear problem, answered at once, and changes nothing."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.db import Pool
from app.idempotency.key import IdempotencyKey
from tests.harness.api import assert_problem, serving
from tests.harness.orders import request_under_way, somebody_waits, somebody_waits_alone
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
JSON = {"content-type": "application/json"}
LIMIT = 64 * 1024
HEAD = "POST /orders HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


def post(status: int, code: str, content: Any = None, **headers: str) -> Any:
    body = json.dumps(LINE).encode() if content is None else content
    return pytest.param("POST", "/orders", body, {**JSON, **headers}, status, code)


async def counted(api: httpx.AsyncClient, status: int) -> bool:
    """Return whether the metrics count one request to place an order with this status."""
    series = f'http_server_request_duration_seconds_count{{method="POST",route="/orders",status="{status}"}} 1.0'
    return series in (await api.get("/metrics")).text


REFUSED = [
    post(400, "malformed-request", b""),
    post(400, "malformed-request", b"{"),
    post(400, "malformed-request", b'{"sku": "a", "quantity": 1, "unit_price": NaN}'),
    post(400, "malformed-request", b'{"sku": "a", "sku": "a", "quantity": 1, "unit_price": 1}'),
    post(400, "malformed-request", json.dumps(LINE).encode("utf-16")),
    post(400, "idempotency-key-invalid", **{"idempotency-key": "two words"}),
    post(400, "idempotency-key-invalid", **{"idempotency-key": "k" * 256}),
    post(400, "idempotency-key-invalid", **{"idempotency-key": '"abc'}),
    post(413, "body-too-large", b" " * (LIMIT + 1)),
    post(413, "body-too-large", b" " * 5_000_000),
    post(415, "unsupported-media-type", **{"content-type": "text/plain"}),
    post(415, "unsupported-media-type", **{"content-type": "application/x-www-form-urlencoded"}),
    post(415, "unsupported-media-type", **{"content-type": "application/jsonp"}),
    post(415, "unsupported-media-type", **{"content-encoding": "gzip"}),
    post(415, "unsupported-media-type", **{"content-encoding": "identity, br"}),
    post(422, "validation-failed", b"[]"),
    post(422, "validation-failed", b"{}"),
    post(422, "validation-failed", json.dumps(LINE | {"surprise": 1}).encode()),
    post(422, "validation-failed", json.dumps(LINE | {"quantity": 0}).encode()),
    post(422, "validation-failed", b'{"\\ud800": 1}'),
    ("GET", "/orders/no-uuid", b"", {}, 422, "validation-failed"),
    ("GET", "/nowhere", b"", {}, 404, "not-found"),
    ("POST", "/orders/", b"", {}, 404, "not-found"),
    ("PUT", "/orders", b"", {}, 405, "method-not-allowed"),
    ("DELETE", "/orders/01890a5d-ac96-774b-bcce-b302099a8057", b"", {}, 405, "method-not-allowed"),
    ("POST", "/livez", b"", {}, 405, "method-not-allowed"),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "code"), REFUSED)
async def test_bad_input_is_a_clear_problem_and_changes_nothing(
    api: httpx.AsyncClient,
    pool: Pool,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    """Each bad request gets its status and code, and nothing is written."""
    assert_problem(await api.request(method, path, content=body, headers=headers), status, code)
    assert await pool.fetchval("SELECT count(*) FROM orders") == 0
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 0


async def test_a_problem_says_where_every_mistake_is(api: httpx.AsyncClient) -> None:
    """The `errors` of a problem point to every mistake."""
    answer = await api.post("/orders", json={"items": [LINE | {"unit_price": 9.999}]})
    assert answer.json()["errors"] == [{"pointer": "/items/0/unit_price", "detail": "has more decimals than USD (2)"}]
    several = await api.post("/orders", json={"items": [LINE | {"sku": "", "quantity": 0}], "country": "NO"})
    assert [each["pointer"] for each in several.json()["errors"]] == ["/items/0/sku", "/items/0/quantity", "/country"]


async def test_a_405_names_the_allowed_methods(api: httpx.AsyncClient) -> None:
    """The `Allow` header lists the methods of every route of the path."""
    assert (await api.delete("/orders")).headers["allow"] == "GET, HEAD, POST"
    assert (await api.put(f"/orders/{uuid4()}")).headers["allow"] == "GET, HEAD"


async def test_two_idempotency_keys_are_invalid(api: httpx.AsyncClient) -> None:
    """A request with two keys is a 400."""
    answer = await api.post("/orders", json=LINE, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    assert_problem(answer, 400, "idempotency-key-invalid")


async def test_a_body_of_just_the_limit_is_read(api: httpx.AsyncClient) -> None:
    """A body of exactly the maximum size is accepted."""
    body = json.dumps(LINE).encode().ljust(LIMIT)
    assert (await api.post("/orders", content=body, headers=JSON)).status_code == 201


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON", None])
async def test_json_is_read_with_every_content_type(api: httpx.AsyncClient, media_type: str | None) -> None:
    """Parameters, upper case and a missing Content-Type are accepted."""
    headers = {} if media_type is None else {"content-type": media_type}
    assert (await api.post("/orders", content=json.dumps(LINE), headers=headers)).status_code == 201


async def blanks(chunks: Iterable[int]) -> AsyncIterator[bytes]:
    for _ in chunks:
        yield b" " * 4096


@pytest.mark.parametrize("chunks", [17, 1000])
async def test_a_chunked_body_is_counted(api: httpx.AsyncClient, chunks: int) -> None:
    """A chunked body beyond the limit is a 413."""
    answer = await api.post("/orders", content=blanks(range(chunks)), headers=JSON)
    assert_problem(answer, 413, "body-too-large")


async def test_an_endless_body_is_cut_off(database_url: str) -> None:
    """The service stops reading after a maximum of discarded bytes."""
    async with serving(database_url, http_body_timeout_seconds=3600) as api:
        with contextlib.suppress(httpx.TransportError):  # a client that never stops sending may lose the answer
            await api.post("/orders", content=blanks(itertools.count()), headers=JSON)
        await wait_until(lambda: counted(api, 413), AMPLE_SECONDS, "the request in the metrics")


async def test_a_late_body_is_a_408(database_url: str) -> None:
    """A body that does not arrive in time is a 408, and the connection closes."""
    async with serving(database_url, http_body_timeout_seconds=0.05) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.base_url.port)
        writer.write(HEAD.encode() + b"{")
        answer = (await reader.read()).decode()  # until the server closes
        writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408 ")
    assert "content-type: application/problem+json" in head
    assert json.loads(body)["code"] == "body-timeout"


async def test_a_client_that_disconnects_early_changes_nothing(api: httpx.AsyncClient, pool: Pool) -> None:
    """A disconnect within the body is status 499 in the metric, and no error."""
    _, writer = await asyncio.open_connection("127.0.0.1", api.base_url.port)
    writer.write(HEAD.encode() + json.dumps(LINE).encode())
    await writer.drain()
    writer.transport.abort()
    await wait_until(lambda: counted(api, 499), AMPLE_SECONDS, "the request in the metrics")
    assert await pool.fetchval("SELECT count(*) FROM orders") == 0


async def test_a_busy_pool_is_a_503(database_url: str, pool: Pool) -> None:
    """While requests use every connection of the pool, another write is a 503 with Retry-After."""
    async with serving(database_url, database_pool_size=1, idempotency_wait_seconds=AMPLE_SECONDS) as api:
        async with request_under_way(pool, IdempotencyKey("default", "k", b"", 1)):
            waiting = asyncio.create_task(api.post("/orders", json=LINE, headers={"Idempotency-Key": "k"}))
            await wait_until(lambda: somebody_waits_alone(pool), AMPLE_SECONDS, "the first request at the key")
            refused = await api.post("/orders", json=LINE)
            assert_problem(refused, 503, "overloaded")
            assert int(refused.headers["retry-after"]) > 0
        assert (await waiting).status_code == 201
        assert (await api.post("/orders", json=LINE)).status_code == 201


async def test_a_slow_statement_is_a_503(database_url: str, pool: Pool) -> None:
    """A statement without an answer in time is a 503."""
    async with serving(database_url, database_statement_seconds=0.2) as api, locked(pool):
        assert_problem(await api.get(f"/orders/{uuid4()}"), 503, "database-unavailable")


async def test_a_read_without_a_free_connection_is_a_503(database_url: str, pool: Pool) -> None:
    """A read that waits too long for a connection of the pool is a 503."""
    async with serving(database_url, database_pool_size=1, database_pool_wait_seconds=0.5) as api:

        async def is_answered() -> bool:
            return (await api.get(f"/orders/{uuid4()}")).status_code == 404

        await wait_until(is_answered, AMPLE_SECONDS, "a connection")
        async with locked(pool):
            waiting = asyncio.create_task(api.get(f"/orders/{uuid4()}"))
            await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "a request that waits")
            assert_problem(await api.get(f"/orders/{uuid4()}"), 503, "database-unavailable")
        assert (await waiting).status_code == 404


@contextlib.asynccontextmanager
async def locked(pool: Pool) -> AsyncIterator[None]:
    """Lock the orders, so that no request can read one."""
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("LOCK TABLE orders")
        yield


async def test_a_refusal_shows_a_bound_as_a_number(api: httpx.AsyncClient) -> None:
    """A problem's detail shows a decimal limit as a plain number."""
    answer = await api.post("/orders", json=LINE | {"unit_price": "99999999999"})
    [error] = answer.json()["errors"]
    assert error == {
        "pointer": "/items/0/unit_price",
        "detail": "Input should be less than or equal to 9999999999.99",
    }

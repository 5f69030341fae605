"""`/ops/outbox` and `/ops/stats`: what operators see, and that only operators see it."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.db import Pool
from app.messaging import outbox
from app.messaging.outbox import PublishRecord
from app.operations.outbox import OutboxAnswer
from app.operations.stats import StatsAnswer
from tests.harness.api import assert_problem, serving
from tests.harness.orders import placed, start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

TOKEN = "a-token-of-the-operators"
ROUTES = ("/ops/outbox", "/ops/stats")


@pytest.fixture
async def ops(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client."""
    async with serving(database_url, admin_token=TOKEN) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield client


async def rows(ops: httpx.AsyncClient, **params: Any) -> list[dict[str, Any]]:
    answer = (await ops.get("/ops/outbox", params=params)).raise_for_status().json()
    OutboxAnswer.model_validate(answer, strict=True)
    found: list[dict[str, Any]] = answer["rows"]
    return found


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer x", f"Bearer {TOKEN}"])
async def test_without_an_admin_token_the_routes_do_not_exist(
    api: httpx.AsyncClient, path: str, authorization: str | None
) -> None:
    """The answer equals that of an unknown path."""
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await api.get(path, headers=headers)
    assert_problem(answer, 404, "not-found")
    assert answer.json() == (await api.get("/nowhere", headers=headers)).json()


@pytest.mark.parametrize("path", ROUTES)
async def test_a_missing_token_is_a_401(ops: httpx.AsyncClient, path: str) -> None:
    """The challenge names no error."""
    del ops.headers["Authorization"]
    answer = await ops.get(path)
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="orders"'


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "given",
    [
        b"Bearer x",
        f"Bearer {TOKEN[:-1]}".encode(),
        f"Bearer {TOKEN}x".encode(),
        f"Bearer {TOKEN.upper()}".encode(),
        f"Basic {TOKEN}".encode(),
        TOKEN.encode(),
        b"Bearer",
        b"Bearer \xff\xfe",
        b"",
    ],
)
async def test_a_wrong_token_is_a_401(ops: httpx.AsyncClient, path: str, given: bytes) -> None:
    """The answer contains nothing of the right token."""
    answer = await ops.get(path, headers={b"Authorization": given})
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="orders", error="invalid_token"')
    assert TOKEN not in answer.text


async def test_two_tokens_are_refused(ops: httpx.AsyncClient) -> None:
    """A request with two Authorization headers is a 401."""
    del ops.headers["Authorization"]
    answer = await ops.get("/ops/stats", headers=[("Authorization", f"Bearer {TOKEN}")] * 2)
    assert_problem(answer, 401, "unauthorized")


async def test_a_waiting_row_is_shown_in_full(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Rows of all tenants are shown, without the data of the event."""
    order = await placed(pool, tenant="other", metadata={"secret": "x"})
    [row] = await rows(ops)
    event = await pool.fetchrow("SELECT * FROM outbox")
    assert event is not None
    assert row == {
        "id": str(event["id"]),
        "type": "orders.order.placed.v1",
        "order_id": str(order.id),
        "sequence": 1,
        "tenant": "other",
        "state": "waiting",
        "reason": None,
        "attempts": 0,
        "occurred_at": order.representation()["placed_at"],
        "next_attempt_at": event["next_attempt_at"].strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "parked_at": None,
    }


async def test_parked_rows_come_first(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Then come the other rows, the longest due first."""
    ids = []
    for _ in range(5):
        await placed(pool)
        ids.append(await pool.fetchval("SELECT id FROM outbox ORDER BY id DESC LIMIT 1"))
    token = uuid4()
    async with pool.acquire() as conn:
        await outbox.claim(conn, token, 5, lease_seconds=60)
        await outbox.release(conn, token, [ids[0], ids[1]])
        await outbox.record_results(conn, token, [PublishRecord(ids[4], "returned: 312 NO_ROUTE")])
        await outbox.record_results(conn, token, [PublishRecord(ids[3], "nack", 3600)])
        await outbox.record_results(conn, token, [])
    await pool.execute("UPDATE outbox SET next_attempt_at = next_attempt_at - interval '1 day' WHERE id = $1", ids[1])
    shown = await rows(ops)
    assert [row["id"] for row in shown] == [str(ids[number]) for number in (4, 1, 0, 2, 3)]
    assert [(row["state"], row["reason"], row["attempts"]) for row in shown] == [
        ("parked", "returned: 312 NO_ROUTE", 1),
        ("waiting", None, 0),
        ("waiting", None, 0),
        ("claimed", None, 0),
        ("waiting", "nack", 1),
    ]
    assert [(row["next_attempt_at"] is None, row["parked_at"] is None) for row in shown] == [
        (True, False),
        *[(False, True)] * 4,
    ]
    assert [row["id"] for row in await rows(ops, limit=2)] == [str(ids[4]), str(ids[1])]


async def test_a_row_behind_another_has_that_reason(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Its reason names the earlier event of the same order."""
    await placed(pool)
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp(), last_error = 'nack', attempts = 10")
    await pool.execute(
        """
        INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at)
        SELECT gen_random_uuid(), 'orders.order.cancelled.v1', subject, 2, tenant, data, occurred_at FROM outbox
        """
    )
    assert [(row["sequence"], row["reason"]) for row in await rows(ops)] == [
        (1, "nack"),
        (2, "waits for sequence 1 of the same order"),
    ]


async def test_counts_do_not_depend_on_the_limit(ops: httpx.AsyncClient, pool: Pool) -> None:
    """The counts include rows that are not shown."""
    for _ in range(5):
        await placed(pool)
    await pool.execute("UPDATE outbox SET pending_since = clock_timestamp() - interval '1 hour'")
    first = "(SELECT id FROM outbox ORDER BY id LIMIT 1)"
    await pool.execute(f"UPDATE outbox SET parked_at = clock_timestamp() WHERE id = {first}")  # noqa: S608 - a constant
    await pool.execute(
        "UPDATE outbox SET published_at = clock_timestamp() WHERE id = (SELECT max(id::text)::uuid FROM outbox)"
    )
    answer = await ops.get("/ops/outbox", params={"limit": 1})
    told = answer.json()
    assert (told["pending"], told["parked"], len(told["rows"])) == (3, 1, 1)
    assert told["oldest_pending_age_seconds"] >= 3600
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "state=parked", "limit=1&limit=1"])
async def test_an_invalid_query_is_refused(ops: httpx.AsyncClient, query: str) -> None:
    """An unknown, repeated or malformed parameter is a 422."""
    assert_problem(await ops.get(f"/ops/outbox?{query}"), 422, "validation-failed")


async def test_the_stats_count_orders_and_sagas(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Four orders of two tenants: one not started, two with sagas (one compensating), one ended."""
    await placed(pool, tenant="other")
    await start_saga(pool)
    turned, ended = await start_saga(pool), await placed(pool)
    await pool.execute("UPDATE orders SET status = 'compensating' WHERE id = $1", turned)
    await pool.execute("UPDATE orders SET status = 'confirmed' WHERE id = $1", ended.id)
    await pool.execute(
        "UPDATE sagas SET started_at = started_at - interval '1 hour', needs_operator_at = started_at WHERE id = $1",
        turned,
    )
    answer = await wait_until(lambda: stats_at_rest(ops), AMPLE_SECONDS, "stats while no background role is at work")
    assert answer is not None
    told = answer.json()
    StatsAnswer.model_validate(told, strict=True)
    assert told["orders"] == {"compensating": 1, "pending": 2}
    assert told["sagas"]["in_flight"] == {"compensating": 1, "pending": 1}
    assert told["sagas"]["oldest_age_seconds"] >= 3600
    assert told["sagas"]["needs_operator"] == 1
    assert (told["outbox"]["pending"], told["outbox"]["parked"]) == (4, 0)
    assert {name: (pool["in_use"], pool["max"]) for name, pool in told["pools"].items()} == {
        "requests": (0, 10),
        "work": (0, 10),
        "relay": (0, 4),
        "probes": (0, 2),
    }
    assert answer.headers["cache-control"] == "no-store"


async def stats_at_rest(ops: httpx.AsyncClient) -> httpx.Response | None:
    """Return the answer, or None if a count of the backlog was using a connection."""
    answer = (await ops.get("/ops/stats")).raise_for_status()
    return None if answer.json()["pools"]["relay"]["in_use"] else answer


async def test_the_stats_of_an_empty_service_are_zeroes(ops: httpx.AsyncClient) -> None:
    """Every count is present, as zero."""
    told = (await ops.get("/ops/stats")).json()
    assert told["orders"] == told["sagas"]["in_flight"] == {"compensating": 0, "pending": 0}
    assert told["sagas"]["oldest_age_seconds"] == told["sagas"]["needs_operator"] == 0
    assert told["outbox"] == {"pending": 0, "oldest_pending_age_seconds": 0, "parked": 0}


async def test_unfinished_orders_are_counted_by_an_index(pool: Pool) -> None:
    """The count does not read the finished orders."""
    await pool.execute(
        """
        INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
        SELECT gen_random_uuid(), 'default', CASE n % 100 WHEN 0 THEN 'pending' ELSE 'confirmed' END, 'USD', 999, 1,
               now(), now()
        FROM generate_series(1, 5000) AS n
        """
    )
    await pool.execute("VACUUM ANALYZE orders")
    plan = "\n".join(
        row[0]
        for row in await pool.fetch(
            "EXPLAIN SELECT status, count(*) FROM orders WHERE status IN ('compensating', 'pending') GROUP BY status"
        )
    )
    assert "orders_status_tenant_placed_at_id_idx" in plan
    assert "Seq Scan" not in plan

"""`/ops/sagas`, for operators only."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.db import Pool
from app.operations.saga_views import SagaAnswer, SagaChanged, SagasAnswer
from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.operating import audit_rows
from tests.harness.orders import placed, start_saga
from tests.harness.sagas import Stage
from tests.harness.sandboxes import set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

TOKEN = "a-token-of-the-operators"
SOME_ID = "01890a5d-ac97-7001-8000-000000000000"
WHY = {"reason": "the warehouse burns"}
ROUTES = (
    ("GET", "/ops/sagas"),
    ("GET", f"/ops/sagas/{SOME_ID}"),
    ("POST", f"/ops/sagas/{SOME_ID}/retry"),
    ("POST", f"/ops/sagas/{SOME_ID}/compensate"),
    ("GET", "/ops/sagas/seven"),
    ("POST", "/ops/sagas/seven/retry"),
)
CHANGES = ("retry", "compensate")


@pytest.fixture
async def ops(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client."""
    async with serving(database_url, admin_token=TOKEN) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield client


async def change(ops: httpx.AsyncClient, action: str, order_id: object) -> SagaChanged:
    answer = (await ops.post(f"/ops/sagas/{order_id}/{action}", json=WHY)).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    return SagaChanged.model_validate(answer.json(), strict=True)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_only_an_operator_is_let_in(
    api: httpx.AsyncClient, ops: httpx.AsyncClient, method: str, path: str
) -> None:
    """Without the token each route is a 401, or a 404 where no operator is configured."""
    assert_problem(await api.request(method, path), 404, "not-found")
    assert_problem(await ops.request(method, path, headers=bearer("x")), 401, "unauthorized")
    del ops.headers["Authorization"]
    assert_problem(await ops.request(method, path), 401, "unauthorized")


async def test_sagas_of_all_tenants_are_listed_and_shown(ops: httpx.AsyncClient, stage: Stage) -> None:
    """Stuck sagas come first, then the oldest."""
    first, second = await start_saga(stage.pool, tenant="other"), await start_saga(stage.pool)
    await stage.pool.execute(
        "UPDATE sagas SET deadline_at = clock_timestamp() - interval '2 min' WHERE id = $1", second
    )
    answer = (await ops.get("/ops/sagas", params={"limit": 2, "status": "pending"})).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    listed = SagasAnswer.model_validate(answer.json(), strict=True).sagas
    assert [(each.order_id, each.tenant, each.stuck) for each in listed] == [
        (str(second), "default", True),
        (str(first), "other", False),
    ]
    stuck = (await ops.get("/ops/sagas", params={"stuck": "true"})).json()["sagas"]
    assert [each["order_id"] for each in stuck] == [str(second)]
    shown = (await ops.get(f"/ops/sagas/{first}")).raise_for_status()
    assert shown.headers["cache-control"] == "no-store"
    saga = SagaAnswer.model_validate(shown.json(), strict=True)
    assert (saga.tenant, saga.status, saga.log, saga.operator_actions) == ("other", "pending", [], [])
    assert saga.saga
    assert (saga.saga.direction, saga.saga.step, saga.saga.attempts) == ("forward", "reserve_inventory", 0)


async def test_changes_are_recorded_with_operator_and_reason(
    ops: httpx.AsyncClient, database_url: str, stage: Stage
) -> None:
    """Retry and compensate report their outcome, and record it."""
    saga, unstarted = await start_saga(stage.pool), (await placed(stage.pool)).id
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    assert (await change(ops, "retry", saga)).outcome == "due"
    assert (await change(ops, "retry", saga)).outcome == "due-already"
    assert (await change(ops, "compensate", saga)).message == f"{saga} turns back"
    assert (await change(ops, "compensate", unstarted)).outcome == "cancelled"
    ended = 'orders_finished_total{reason="compensated-by-operator",status="cancelled"} 1.0'
    assert ended in (await ops.get("/metrics")).text
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET) as other:
        other.headers.update(bearer(token(scope="orders:operate", sub="grace", tenant=None)))
        assert (await change(other, "compensate", saga)).outcome == "turned-before"
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: compensated-by-operator"
    why = WHY["reason"]
    assert await audit_rows(stage.pool) == [
        ("admin-token", "retry", saga, why, "due"),
        ("admin-token", "retry", saga, why, "due-already"),
        ("admin-token", "compensate", saga, why, "turns-back"),
        ("admin-token", "compensate", unstarted, why, "cancelled"),
        ("grace", "compensate", saga, why, "turned-before"),
    ]
    shown = (await ops.get(f"/ops/sagas/{saga}")).json()["operator_actions"]
    assert [(each["actor"], each["outcome"]) for each in shown] == [
        ("admin-token", "due"),
        ("admin-token", "due-already"),
        ("admin-token", "turns-back"),
        ("grace", "turned-before"),
    ]


async def test_a_change_wakes_the_sagas_of_its_process(database_url: str, stage: Stage, sandbox_url: str) -> None:
    """The process polls once a minute, and the saga pauses for an hour: the change runs it at once."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error", "times": 1})
    await stage.orchestrator().run_once()
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    settings: dict[str, Any] = {"roles": "api,relay,consumer", "admin_token": TOKEN, "saga_poll_seconds": 60, **urls}

    async def it_is_confirmed() -> bool:
        return await stage.outcome(saga) == "confirmed"

    async with serving(database_url, **settings) as ops:
        ops.headers.update(bearer(TOKEN))
        assert (await change(ops, "retry", saga)).outcome == "due"
        await wait_until(it_is_confirmed, AMPLE_SECONDS, "end of the saga")


async def test_an_impossible_change_is_a_409_or_a_404(ops: httpx.AsyncClient, stage: Stage) -> None:
    """The 409 is final and has no Retry-After."""
    saga, unstarted = await start_saga(stage.pool), (await placed(stage.pool)).id
    await stage.drive()
    for action, code in zip(CHANGES, ("saga-not-retriable", "order-not-cancellable"), strict=True):
        refused = await ops.post(f"/ops/sagas/{saga}/{action}", json=WHY)
        assert_problem(refused, 409, code)
        assert "retry-after" not in refused.headers
        assert_problem(await ops.post(f"/ops/sagas/{uuid4()}/{action}", json=WHY), 404, "order-not-found")
    assert_problem(await ops.post(f"/ops/sagas/{unstarted}/retry", json=WHY), 409, "saga-not-retriable")
    assert_problem(await ops.get(f"/ops/sagas/{uuid4()}"), 404, "order-not-found")


@pytest.mark.parametrize("action", CHANGES)
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "malformed-request"),
        (b"{", 400, "malformed-request"),
        (b"{}", 422, "validation-failed"),
        (b"[]", 422, "validation-failed"),
        (b'{"reason": ""}', 422, "validation-failed"),
        (b'{"reason": "  "}', 422, "validation-failed"),
        (b'{"reason": "two\\nlines"}', 422, "validation-failed"),
        (b'{"reason": "\\u202e"}', 422, "validation-failed"),
        (b'{"reason": "\\ud800"}', 422, "validation-failed"),
        (b'{"reason": 7}', 422, "validation-failed"),
        (b'{"reason": "' + b"x" * 501 + b'"}', 422, "validation-failed"),
        (b'{"reason": "x", "dry_run": true}', 422, "validation-failed"),
        (b" " * 70_000, 413, "body-too-large"),
    ],
)
async def test_an_invalid_reason_changes_nothing(
    ops: httpx.AsyncClient, pool: Pool, action: str, content: bytes, status: int, code: str
) -> None:
    """A missing, blank or malformed reason is refused."""
    saga = await start_saga(pool)
    path = f"/ops/sagas/{saga}/{action}"
    assert_problem(await ops.post(path, content=content, headers={"Content-Type": "application/json"}), status, code)
    assert_problem(await ops.post(f"{path}?dry_run=true", json=WHY), 422, "validation-failed")
    assert await audit_rows(pool) == []
    assert await pool.fetchval("SELECT cancel_requested_at FROM orders") is None


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "unauthorized"),
        (bearer("x"), 401, "unauthorized"),
        (bearer(TOKEN), 400, "malformed-request"),
    ],
)
async def test_a_body_is_parsed_for_an_operator_only(
    ops: httpx.AsyncClient, headers: dict[str, str], status: int, code: str
) -> None:
    """Bad JSON without the operators' token is a 401: the answer says nothing about the body."""
    del ops.headers["Authorization"]
    for path in (f"/ops/sagas/{SOME_ID}/retry", "/ops/dlq/purge", f"/ops/outbox/{SOME_ID}/requeue"):
        answer = await ops.post(path, content=b"{", headers={"Content-Type": "application/json", **headers})
        assert_problem(answer, status, code)


async def test_a_mistake_in_a_body_has_its_pointer(ops: httpx.AsyncClient) -> None:
    """A pointer into the body starts at the body, one into the query at `/query`."""
    path = f"/ops/sagas/{SOME_ID}/retry"
    answer = (await ops.post(path, json={"reason": "", "a/b": 1})).json()
    assert answer["detail"] == "the body is not valid"
    assert [error["pointer"] for error in answer["errors"]] == ["/reason", "/a~1b"]
    answer = (await ops.post(f"{path}?dry_run=true", json=WHY)).json()
    assert answer["detail"] == "the query is not valid"
    assert [error["pointer"] for error in answer["errors"]] == ["/query/dry_run"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "status=confirmed", "status=x", "stuck=1", "older=7"])
async def test_an_invalid_query_is_refused(ops: httpx.AsyncClient, query: str) -> None:
    """An unknown or malformed parameter is a 422."""
    assert_problem(await ops.get(f"/ops/sagas?{query}"), 422, "validation-failed")

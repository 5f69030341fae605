"""`/livez`, `/readyz`, `/metrics` and the documents, and how the service behaves without Postgres."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from app.api.server import listener as server_listener
from app.db import Pool, migrate
from tests.harness import servers
from tests.harness.api import assert_problem, serving
from tests.harness.ports import free_port
from tests.harness.processes import REPOSITORY
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
KEY = {"Idempotency-Key": "k"}
OUTBOX = {"name": "outbox", "status": "ok", "detail": "no event has waited for more than 300 s"}
READY = {
    "status": "ok",
    "checks": [{"name": "postgres", "status": "ok", "detail": "reachable, schema current"}, OUTBOX],
}
DOWN = {
    "status": "down",
    "checks": [
        {"name": "postgres", "status": "down", "detail": "postgres is out of reach"},
        {"name": "outbox", "status": "degraded", "detail": "outbox is out of reach"},
    ],
}


async def becomes_ready(process: httpx.AsyncClient, path: str = "/readyz") -> None:
    """Wait until the process is ready: a check has a timeout, and its result is reused for a second."""
    await becomes(process, 200, READY, path)


async def becomes(process: httpx.AsyncClient, status: int, readiness: object, path: str = "/readyz") -> None:
    async def found() -> bool:
        answer = await process.get(path)
        return (answer.status_code, answer.json()) == (status, readiness)

    await wait_until(found, AMPLE_SECONDS, f"{readiness}")


FROM_THE_START = (
    'age_limit_exceeded_rows{state="due",table="sagas"}',
    'http_server_request_duration_seconds_count{method="POST",route="/orders",status="201"}',
    'invariant_violations{invariant="I5"}',
    'invariant_checked_timestamp_seconds{invariant="I9"}',
    "orders_unstarted",
    "outbox_pending",
    "outbox_oldest_pending_age_seconds",
    "outbox_published_total",
    "outbox_publish_failed_total",
    "outbox_returned_total",
    "outbox_parked",
    "consumer_processed_total",
    "consumer_dedup_hits_total",
    "consumer_failed_total",
    "dlq_messages_total",
    "dlq_depth",
    'queue_depth{queue="orders.saga"}',
    "outbox_resent_total",
    'janitor_pruned_total{table="outbox"}',
    'janitor_failures_total{table="sagas"}',
    'idempotency_cache_hits_total{source="redis"}',
    'idempotency_cache_hits_total{source="postgres"}',
    'idempotency_cache_hits_total{source="memory"}',
    'idempotency_conflicts_total{kind="in-progress"}',
    'idempotency_conflicts_total{kind="reused"}',
    "orders_placed_total",
    'orders_finished_total{reason="",status="confirmed"}',
    'orders_finished_total{reason="timed-out",status="rejected"}',
    'saga_in_flight{status="compensating"}',
    'saga_in_flight{status="pending"}',
    "saga_duration_seconds_count",
    'saga_step_duration_seconds_count{action="do",outcome="done",step="charge_payment"}',
    'saga_compensation_failed_total{step="charge_payment"}',
    "saga_oldest_unfinished_age_seconds",
    "saga_needs_operator",
    "inventory_holds_expired_total",
    'partner_circuit_state{partner="inventory"}',
    'partner_circuit_state{partner="payment"}',
    'partner_circuit_state{partner="shipping"}',
)


@pytest.mark.parametrize("path", ["/livez", "/health/live"])
async def test_a_process_that_answers_is_alive(api: httpx.AsyncClient, path: str) -> None:
    """`/livez` answers 200."""
    answer = await api.get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/readyz", "/health/ready"])
async def test_a_process_with_its_database_is_ready(api: httpx.AsyncClient, path: str) -> None:
    """`/readyz` answers 200, with one row for each check."""
    await becomes_ready(api, path)


async def test_readiness_depends_on_the_schema(api: httpx.AsyncClient, pool: Pool) -> None:
    """A process is not ready on a schema that is behind, and ready on a newer one."""
    await pool.execute("UPDATE alembic_version SET version_num = 'of a later release'")
    await becomes_ready(api)
    await pool.execute("DELETE FROM alembic_version")
    await becomes(api, 503, {**DOWN, "checks": [DOWN["checks"][0], OUTBOX]})


@pytest.mark.parametrize("roles", ["api", "api,relay,consumer,janitor"])
async def test_every_metric_starts_at_zero(database_url: str, sandbox_url: str, roles: str) -> None:
    """Every metric of the contract is exposed from the start."""
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with serving(database_url, roles=roles, **partners) as process:
        told = await process.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in told.text.splitlines() if not line.startswith("#"))
    assert {
        "db_pool_in_use",
        "log_lines_dropped_total",
    } <= values.keys()  # metrics of the process, which need not be zero
    # The janitor's first pass may be over by now.
    checked = {name for name in FROM_THE_START if name.startswith("invariant_checked_timestamp_seconds")}
    assert checked <= values.keys()
    zero = [name for name in FROM_THE_START if name not in checked]
    assert {name: values.get(name) for name in zero} == dict.fromkeys(zero, "0.0")


async def test_waiting_outbox_rows_are_measured(api: httpx.AsyncClient, pool: Pool) -> None:
    """The gauges show the number and the age of pending rows."""
    for _ in range(3):
        await api.post("/orders", json=LINE)
    await pool.execute("UPDATE outbox SET pending_since = pending_since - interval '1 hour'")

    async def measured() -> list[str]:
        lines = (await api.get("/metrics")).text.splitlines()
        return lines if "outbox_pending 3.0" in lines else []

    lines = await wait_until(measured, AMPLE_SECONDS, "three events in the metrics")
    [age] = [float(line.split()[1]) for line in lines if line.startswith("outbox_oldest_pending_age_seconds ")]
    assert age == pytest.approx(3600, abs=60)


async def test_the_documents_are_served(api: httpx.AsyncClient) -> None:
    """The service serves its OpenAPI document and its pages."""
    document = (await api.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert {"/orders", "/orders/{order_id}", "/livez", "/readyz", "/metrics"} <= set(document["paths"])
    body = document["paths"]["/orders"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["items"]["items"]["properties"]["sku"]["maxLength"] == 50
    for reference in set(re.findall(r'"\$ref": ?"([^"]*)"', json.dumps(document))):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    page = await api.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")


async def test_requests_are_a_503_while_postgres_is_down(
    server_directory: Path,
) -> None:
    """Each answer has Retry-After, and requests succeed again when Postgres is back."""
    async with servers.postgres(server_directory) as postgres:
        await asyncio.to_thread(migrate, postgres.url)
        async with serving(postgres.url) as api:
            first = await api.post("/orders", json=LINE, headers=KEY)
            await postgres.kill()
            for _ in range(2):  # with an open connection, and without one
                for request in (("POST", "/orders"), ("GET", first.headers["location"])):
                    answer = await api.request(*request, json=LINE)
                    assert_problem(answer, 503, "database-unavailable")
                    assert int(answer.headers["retry-after"]) > 0
            down = await api.get("/readyz")
            assert (down.status_code, down.json()) == (503, DOWN)
            assert (await api.get("/livez")).status_code == 200
            assert "orders_placed_total 1.0" in (await api.get("/metrics")).text
            await postgres.start()
            await becomes_ready(api)
            again = await api.post("/orders", json=LINE, headers=KEY)
            assert (again.content, again.headers["idempotent-replay"]) == (first.content, "true")


async def test_a_process_that_starts_without_postgres_waits_for_it(server_directory: Path) -> None:
    """The process starts, is not ready, and works when Postgres is up."""
    postgres = servers.postgres(server_directory)
    async with postgres:
        await asyncio.to_thread(migrate, postgres.url)
    async with serving(postgres.url) as api:
        assert (await api.get("/readyz")).json() == DOWN
        assert_problem(await api.post("/orders", json=LINE), 503, "database-unavailable")
        async with postgres:
            assert (await api.post("/orders", json=LINE)).status_code == 201


@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
async def test_the_wildcard_address_takes_both_families(client: str) -> None:
    """A container whose ORDERS_HOST is `::` is also reached over IPv4, as its health check needs."""
    with contextlib.closing(server_listener.listen("::", 0)) as listener:
        _, writer = await asyncio.open_connection(client, listener.getsockname()[1])
        writer.close()


async def test_a_short_admin_token_is_a_warning(database_url: str) -> None:
    """An ADMIN_TOKEN under 16 characters is logged as a warning."""
    for token, warned in (("fifteen-letters", True), ("sixteen--letters", False)):
        with capture_logs() as logs:
            async with serving(database_url, admin_token=token):
                pass
        assert ("auth.short_admin_token" in [line["event"] for line in logs]) is warned


async def health_check(port: int | None, **env: str) -> int:
    """Run the image's health check, and return its exit code."""
    command = (sys.executable, "-m", "app.healthcheck")
    env = {**os.environ, "ORDERS_PORT": str(port), **env}
    check = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL)
    return await check.wait()


async def test_the_image_health_check_uses_no_proxy(database_url: str) -> None:
    """Proxy variables do not affect the health check."""
    proxy = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    async with serving(database_url) as process:

        async def succeeds() -> bool:
            return await health_check(process.base_url.port, **proxy) == 0

        await wait_until(succeeds, AMPLE_SECONDS, "an answer")
    assert await health_check(free_port(), **proxy) == 1

"""What `/metrics` and `/readyz` show about loops, ages, the outbox and the database."""

import httpx
import pytest

from app.db import Pool
from app.operations import ages, database_stats
from tests.harness.ages import put_row
from tests.harness.api import serving
from tests.harness.events import make_due, make_garbage, put_old_event
from tests.harness.observed import parse_openmetrics
from tests.harness.wait import AMPLE_SECONDS, wait_until

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
LOOP = "loop_last_success_timestamp_seconds"
LOOPS = {
    "api": {"backlog", "waiters"},
    "relay": {"relay", "transport", "depths"},
    "consumer": {"orchestrator", "pauses", "consumer", "transport", "depths"},
    "janitor": {"resender", "janitor", "lost-letters", "verify"},
}


async def samples(process: httpx.AsyncClient, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of one metric by the values of their labels (`table`, `state`)."""
    answer = (await process.get("/metrics", headers=OPENMETRICS)).raise_for_status()
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels, reverse=True)): sample.value
        for sample in parse_openmetrics(answer.text)
        if sample.name == name
    }


@pytest.mark.parametrize("role", LOOPS)
async def test_every_loop_of_a_role_reports_success(
    database_url: str, rabbitmq_url: str, sandbox_url: str, role: str
) -> None:
    """It has a timestamp soon after the start; loops of other roles are absent."""
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with serving(database_url, roles=role, rabbitmq_url=rabbitmq_url, **partners) as process:

        async def succeeded() -> bool:
            found = await samples(process, LOOP)
            assert {(loop,) for loop in LOOPS[role]} <= set(found)
            assert ("relay",) not in found or role == "relay"
            return all(found[(loop,)] > 0 for loop in LOOPS[role])

        await wait_until(succeeded, AMPLE_SECONDS, "a success of every loop")


async def test_a_loop_that_always_fails_stays_at_zero(database_url: str) -> None:
    """So it looks older than any limit."""
    async with serving(database_url, roles="relay", rabbitmq_url="amqp://127.0.0.1:1/") as process:

        async def others_succeeded() -> bool:
            return (await samples(process, LOOP))[("transport",)] > 0

        await wait_until(others_succeeded, AMPLE_SECONDS, "a renewal of the lease")
        assert (await samples(process, LOOP))[("relay",)] == 0


async def test_overdue_rows_are_counted(api: httpx.AsyncClient, pool: Pool) -> None:
    """Each state that has no metric of its own has a series, at zero from the start."""
    assert await samples(api, ages.GAUGE) == {(limit.table, limit.state): 0 for limit in ages.gauged()}
    for limit in ages.gauged():
        await put_row(pool, limit, (limit.limit_seconds or 0) + 30)

    async def counted() -> bool:
        return all(value == 1 for value in (await samples(api, ages.GAUGE)).values())

    await wait_until(counted, AMPLE_SECONDS, "a row in every state")


async def test_a_held_snapshot_is_measured(api: httpx.AsyncClient, pool: Pool) -> None:
    """The gauge shows the age of the transaction that holds it, and falls when it ends."""
    name = "database_oldest_snapshot_age_seconds"
    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read"):
        await conn.execute("SELECT 1")

        async def age_rises() -> bool:
            return (await samples(api, name)).get((), 0) > 2

        await wait_until(age_rises, AMPLE_SECONDS, "an age above 2 s")

    async def is_released() -> bool:
        return (await samples(api, name))[()] < 2

    await wait_until(is_released, AMPLE_SECONDS, "no old snapshot")


async def test_what_a_role_may_not_see_is_absent(pool: Pool) -> None:
    """Without the right to see other sessions, the age is unknown, not 0."""
    async with pool.acquire() as conn:
        assert await database_stats.oldest_snapshot_age_seconds(conn) is not None
        transaction = conn.transaction()
        await transaction.start()
        await conn.execute("CREATE ROLE orders_test_blind; SET LOCAL ROLE orders_test_blind")
        assert await database_stats.oldest_snapshot_age_seconds(conn) is None
        await transaction.rollback()


async def test_dead_tuples_are_measured(api: httpx.AsyncClient, pool: Pool) -> None:
    """Every hot table has a series, which counts what vacuum has not removed."""
    await make_garbage(pool)

    async def counted() -> bool:
        found = await samples(api, "database_dead_tuples")
        assert set(found) == {(table,) for table in database_stats.HOT_TABLES}
        return found[("outbox",)] > 0

    await wait_until(counted, AMPLE_SECONDS, "a dead tuple of the outbox")


async def test_openmetrics_are_served_on_request(api: httpx.AsyncClient) -> None:
    """The parser accepts them, and both formats have the same samples."""
    plain, open_metrics = await api.get("/metrics"), await api.get("/metrics", headers=OPENMETRICS)
    assert open_metrics.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert plain.headers["content-type"].startswith("text/plain; ")
    names = {sample.name for sample in parse_openmetrics(open_metrics.text)}
    lines = [line for line in plain.text.splitlines() if not line.startswith("#")]
    assert names == {line.partition("{")[0].partition(" ")[0] for line in lines}


@pytest.mark.parametrize(("roles", "code", "status"), [("api,relay", 200, "degraded"), ("relay", 503, "down")])
async def test_readiness_reports_an_old_event(
    database_url: str, rabbitmq_url: str, pool: Pool, roles: str, code: int, status: str
) -> None:
    """A process that only publishes is down then; one that takes orders still takes them."""
    async with serving(database_url, roles=roles, rabbitmq_url=rabbitmq_url) as process:

        async def answers(expected: int, outbox: str) -> bool:
            answer = await process.get("/readyz")
            rows = {row["name"]: row["status"] for row in answer.json()["checks"]}
            return (answer.status_code, rows["outbox"]) == (expected, outbox)

        await wait_until(lambda: answers(200, "ok"), AMPLE_SECONDS, "readiness")
        await put_old_event(pool)
        await wait_until(lambda: answers(code, status), AMPLE_SECONDS, f"{code} {status}")
        await make_due(pool)
        await wait_until(lambda: answers(200, "ok"), AMPLE_SECONDS, "readiness after the relay has published it")

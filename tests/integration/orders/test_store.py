"""The transactions that write orders: all of an order or nothing, one order per key, one event per status."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from itertools import product
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.db import Pool
from app.errors import IdempotencyKeyReused, OrderNotFound, RequestInProgress
from app.idempotency.key import IdempotencyKey
from app.orders import store
from app.orders.model import Line, Order, Reason, Status, may_become
from tests.harness.orders import TENANT, place, placed, request_under_way, somebody_waits
from tests.harness.wait import AMPLE_SECONDS, wait_until

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
TABLES = ("orders", "order_lines", "outbox", "idempotency_keys")


def key(
    name: str = "k", fingerprint: bytes = b"this request", version: int = 1, tenant: str = TENANT
) -> IdempotencyKey:
    return IdempotencyKey(tenant, name, fingerprint, version)


async def counts(pool: Pool) -> dict[str, int]:
    return {table: await pool.fetchval(f"SELECT count(*) FROM {table}") for table in TABLES}  # noqa: S608 - constants


async def test_order_lines_event_and_key_are_written_together(pool: Pool) -> None:
    lines = (Line("A", 1, 5), Line("B", 2, 7), Line("A", 3, 0))
    answer = await place(pool, key(), lines=lines, trace=TRACE, metadata={"a": ["ü", 1]}, customer_id="cus_1")
    assert await counts(pool) == {"orders": 1, "order_lines": 3, "outbox": 1, "idempotency_keys": 1}
    order = await store.get(pool, TENANT, UUID(answer.location.removeprefix("/orders/")))
    assert (order.lines, order.total_minor, order.metadata) == (lines, 19, {"a": ["ü", 1]})
    assert json.loads(answer.body) == order.representation()
    event = await pool.fetchrow("SELECT * FROM outbox")
    assert event is not None
    assert json.loads(event["data"]) == order.representation()
    told = (event["type"], event["subject"], event["sequence"], event["tenant"], event["occurred_at"])
    assert told == ("orders.order.placed.v1", str(order.id), 1, TENANT, order.placed_at)
    assert {name: event[name] for name in TRACE} == TRACE
    stored = await pool.fetchrow("SELECT status, location, body FROM idempotency_keys")
    assert tuple(stored or ()) == (201, answer.location, answer.body)


async def test_a_transaction_that_fails_writes_nothing_at_all(pool: Pool) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await place(pool, key(), lines=(Line("A", 1, 5), Line("B", 0, 5)))
    assert set((await counts(pool)).values()) == {0}
    assert not (await place(pool, key())).replayed


async def test_an_order_whose_event_is_refused_does_not_exist(pool: Pool) -> None:
    """The event is written last, and in the same transaction: without it there is neither order nor key."""
    await pool.execute("ALTER TABLE outbox ADD CONSTRAINT full_up CHECK (false)")
    with pytest.raises(asyncpg.CheckViolationError):
        await place(pool, key())
    assert set((await counts(pool)).values()) == {0}


async def test_without_a_key_every_request_is_an_order_of_its_own(pool: Pool) -> None:
    await place(pool)
    await place(pool)
    assert await counts(pool) == {"orders": 2, "order_lines": 2, "outbox": 2, "idempotency_keys": 0}


async def test_requests_with_one_key_at_the_same_instant_are_one_order_and_one_answer(pool: Pool) -> None:
    # Opened before: eight at once may take longer than a request waits for one.
    async with contextlib.AsyncExitStack() as opened:
        for _ in range(8):
            await opened.enter_async_context(pool.acquire())
    answers = await asyncio.gather(*(place(pool, key()) for _ in range(8)))
    assert len({(answer.status, answer.location, answer.body) for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 7
    assert await counts(pool) == {"orders": 1, "order_lines": 1, "outbox": 1, "idempotency_keys": 1}


async def test_a_replay_is_the_first_answer_whatever_has_become_of_the_order(pool: Pool) -> None:
    first = await place(pool, key())
    await pool.execute("UPDATE orders SET status = 'confirmed', version = 2")
    again = await place(pool, key())
    assert (again.status, again.location, again.body, again.replayed) == (201, first.location, first.body, True)


@pytest.mark.parametrize("other", [key(fingerprint=b"another request"), key(version=2)])
async def test_a_key_that_stands_for_another_request_is_refused(pool: Pool, other: IdempotencyKey) -> None:
    await place(pool, key())
    with pytest.raises(IdempotencyKeyReused):
        await place(pool, other)
    assert (await counts(pool))["orders"] == 1


async def test_a_key_is_its_tenants_own(pool: Pool) -> None:
    await place(pool, key())
    assert not (await place(pool, key(tenant="other"), tenant="other")).replayed


async def test_an_expired_key_is_free_again_for_any_request(pool: Pool) -> None:
    first = await place(pool, key())
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    second = await place(pool, key(fingerprint=b"another request"), ttl_seconds=60)
    assert (second.replayed, second.location == first.location) == (False, False)
    assert await counts(pool) == {"orders": 2, "order_lines": 2, "outbox": 2, "idempotency_keys": 1}
    lifetime = await pool.fetchval("SELECT extract(epoch FROM expires_at - created_at)::float8 FROM idempotency_keys")
    assert lifetime == pytest.approx(60, abs=1)
    assert (await place(pool, key(fingerprint=b"another request"))).body == second.body


async def test_of_many_that_find_an_expired_key_one_takes_it_over(pool: Pool) -> None:
    await place(pool, key())
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    answers = await asyncio.gather(*(place(pool, key()) for _ in range(8)))
    assert len({answer.body for answer in answers}) == 1
    assert (await counts(pool))["orders"] == 2


async def test_a_first_request_that_runs_past_the_wait_is_said_to_be_in_progress(pool: Pool) -> None:
    async with request_under_way(pool, key()):
        with pytest.raises(RequestInProgress):
            await place(pool, key(), wait_seconds=0.01)
    assert set((await counts(pool)).values()) == {0}


async def test_a_request_that_waited_replays_what_the_first_committed(pool: Pool) -> None:
    async with request_under_way(pool, key()) as first:
        second = asyncio.create_task(place(pool, key()))
        await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "the second request at the key")
        await first.commit()
        assert (await second).body == b"the first answer"


async def test_a_request_that_waited_becomes_the_first_when_the_first_rolls_back(pool: Pool) -> None:
    async with request_under_way(pool, key()) as first:
        second = asyncio.create_task(place(pool, key()))
        await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "the second request at the key")
        await first.rollback()
        assert not (await second).replayed
    assert (await counts(pool))["orders"] == 1


Change = Callable[[Order, Status], Awaitable[Order]]


@pytest.fixture
def change(pool: Pool) -> Change:
    """Change an order's status in a transaction of its own."""

    async def change(order: Order, status: Status) -> Order:
        async with pool.acquire() as conn, conn.transaction():
            locked = await store.load(conn, order.id, lock=True)
            assert locked is not None
            return await store.change_status(conn, locked, status, Reason.TIMED_OUT, TRACE)

    return change


async def test_a_change_of_status_is_told_by_an_event_with_the_orders_version(pool: Pool, change: Change) -> None:
    order = await placed(pool)
    compensating = await change(order, Status.COMPENSATING)
    rejected = await change(compensating, Status.REJECTED)
    assert rejected == await store.get(pool, TENANT, order.id)
    assert (rejected.version, rejected.status_reason, rejected.tracking_id) == (3, Reason.TIMED_OUT, None)
    assert order.updated_at <= compensating.updated_at <= rejected.updated_at
    told = await pool.fetch("SELECT type, sequence, data, traceparent FROM outbox ORDER BY sequence")
    assert [(row["type"], row["sequence"]) for row in told] == [
        ("orders.order.placed.v1", 1),
        ("orders.order.rejected.v1", 3),
    ]
    assert json.loads(told[1]["data"]) == rejected.representation()
    assert told[1]["traceparent"] == TRACE["traceparent"]


ILLEGAL = [(present, following) for present, following in product(Status, Status) if not may_become(present, following)]


@pytest.mark.parametrize("present", Status)
async def test_a_change_that_is_none_of_the_transitions_is_a_bug_and_changes_nothing(
    pool: Pool, change: Change, present: Status
) -> None:
    order = await placed(pool)
    await pool.execute("UPDATE orders SET status = $1", present)
    for following in (following for before, following in ILLEGAL if before is present):
        with pytest.raises(AssertionError, match=f"cannot go from {present} to {following}"):
            await change(order, following)
    unchanged = await store.get(pool, TENANT, order.id)
    assert (unchanged.status, unchanged.version, (await counts(pool))["outbox"]) == (present, 1, 1)


async def test_an_order_is_there_for_its_own_tenant_only(pool: Pool) -> None:
    order = await placed(pool, tenant="one")
    assert await store.get(pool, "one", order.id) == order
    with pytest.raises(OrderNotFound):
        await store.get(pool, "other", order.id)
    with pytest.raises(OrderNotFound):
        await store.get(pool, "one", uuid4())

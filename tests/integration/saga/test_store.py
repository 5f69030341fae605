"""A saga's row is inserted once, claimed by one process at a time, and written only by the holder of its lease."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest

from app import db
from app.messaging.envelope import Envelope, UnreadableMessage
from app.orders.model import Reason, Status
from app.saga import plan, queries, steps, store
from app.saga import start as saga_start
from app.saga.plan import SagaDirection, SagaState
from app.saga.steps import Action, Step
from app.saga.store import Saga, SagaWrite, StepLogEntry
from tests.harness.cancelling import cancel
from tests.harness.orders import event_of, placed, start_saga

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
LEASE_SECONDS = 30.0
CALLED = StepLogEntry(Step.RESERVE_INVENTORY, Action.DO, 1, "attempted")
ANSWERED = StepLogEntry(Step.RESERVE_INVENTORY, Action.DO, 1, "done", None, {"reservation_id": "res_1"})


async def start(pool: db.Pool, envelope: Envelope) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await saga_start.handle_order_placed(conn, [envelope], deadline_seconds=900)


async def claim(conn: db.Connection | db.Pool, owner: str = "one", limit: int = 10) -> list[Saga]:
    return await store.claim(conn, owner, steps.PLANS, limit, LEASE_SECONDS)  # type: ignore[arg-type] # a pool does too


async def save(
    pool: db.Pool,
    saga: Saga,
    state: SagaState,
    entries: Sequence[StepLogEntry] = (),
    *,
    due_in_seconds: float = 0,
    owner: str | None = None,
    operator_in_seconds: float | None = None,
) -> Saga:
    """Write one saga. Raises KeyError if another process has claimed it."""
    write = SagaWrite(saga, state, entries, due_in_seconds, owner, operator_in_seconds)
    async with pool.acquire() as conn:
        return (await store.save(conn, [write]))[write.claim]


async def row(pool: db.Pool, saga_id: UUID) -> dict[str, Any]:
    query = """
        SELECT *, next_attempt_at <= clock_timestamp() AS due,
               extract(epoch FROM next_attempt_at - updated_at)::float8 AS due_in_seconds,
               extract(epoch FROM deadline_at - started_at)::float8 AS deadline_seconds
        FROM sagas WHERE id = $1
    """
    return dict(await pool.fetchrow(query, saga_id) or {})


async def logged(pool: db.Pool) -> list[tuple[Any, ...]]:
    rows = await pool.fetch("SELECT step, action, attempt, outcome, detail, reply FROM saga_steps ORDER BY id")
    return [tuple(row) for row in rows]


async def make_due(pool: db.Pool) -> None:
    await pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp()")


async def test_repeated_events_start_one_saga(pool: db.Pool) -> None:
    order = await placed(pool)
    await start(pool, event_of(order, **TRACE))
    before = await row(pool, order.id)
    for _ in range(3):
        await start(pool, event_of(order))
    assert await pool.fetchval("SELECT count(*) FROM sagas") == 1
    after = await row(pool, order.id)
    assert after == before
    assert (after["direction"], after["step"], after["attempts"], after["version"]) == (
        "forward", "reserve_inventory", 0, 1,
    )  # fmt: skip
    assert (after["due"], after["deadline_seconds"], after["finished_at"]) == (True, 900, None)
    assert {name: after[name] for name in TRACE} == TRACE


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.PENDING])
async def test_only_a_pending_order_gets_a_saga(pool: db.Pool, status: Status) -> None:
    order = await placed(pool)
    await pool.execute("UPDATE orders SET status = $1", status)
    await start(pool, event_of(order))
    assert await pool.fetchval("SELECT count(*) FROM sagas") == 0


@pytest.mark.parametrize("subject", ["271fc92a-ce8b-47aa-b0bb-f00b1a94ab76", "no-uuid", ""])
async def test_event_of_an_unknown_order_is_unreadable(pool: db.Pool, subject: str) -> None:
    order = await placed(pool)
    with pytest.raises(UnreadableMessage):
        await start(pool, dataclasses.replace(event_of(order), subject=subject))


async def test_claim_takes_the_longest_due_first(pool: db.Pool) -> None:
    """A claimed saga is not claimed again, and a saga that is not due is not claimed."""
    ids = [await start_saga(pool) for _ in range(4)]
    for number, saga_id in enumerate(ids):
        query = "UPDATE sagas SET next_attempt_at = clock_timestamp() - make_interval(secs => $2) WHERE id = $1"
        await pool.execute(query, saga_id, (30, 20, 10, -60)[number])
    assert {saga.id for saga in await claim(pool, limit=2)} == set(ids[:2])
    assert [saga.id for saga in await claim(pool)] == [ids[2]]
    assert await claim(pool) == []


async def test_failing_sagas_do_not_starve_new_ones(pool: db.Pool) -> None:
    """They are due again at once and outnumber the limit; a new saga is claimed after each of them was claimed once."""
    for _ in range(20):
        await start_saga(pool)
    new, turns = None, []
    for number in range(15):
        for saga in await claim(pool, limit=4):
            turns.append(saga.id)
            await save(pool, saga, saga.state)
        if number == 4:
            assert len(set(turns)) == 20
            new = await start_saga(pool)
    assert new in turns[20 : 2 * 20 + 1]


async def test_claim_returns_what_the_runner_needs(pool: db.Pool) -> None:
    order = await placed(pool)
    await start(pool, event_of(order, **TRACE))
    [saga] = await claim(pool)
    assert (saga.id, saga.version, saga.state, saga.trace) == (order.id, 2, plan.begin(), TRACE)
    assert 0 < saga.remaining_seconds <= 900
    stored = await row(pool, order.id)
    assert (stored["version"], stored["lease_owner"], stored["due"]) == (2, "one", False)
    assert saga.started_at == stored["started_at"]


@pytest.mark.parametrize(
    ("deadline_seconds", "hold_seconds", "held_seconds"), [(900, None, 1200), (0.25, None, 301), (900, 901, 901)]
)
async def test_hold_time_is_the_same_at_every_attempt(
    pool: db.Pool, deadline_seconds: float, hold_seconds: int | None, held_seconds: int
) -> None:
    """The hold time is longer than the saga may take."""
    order = await placed(pool)
    async with pool.acquire() as conn, conn.transaction():
        await saga_start.handle_order_placed(conn, [event_of(order)], deadline_seconds, hold_seconds)
    for _ in range(2):
        [saga] = await claim(pool)
        assert saga.hold_seconds == held_seconds
        await make_due(pool)


async def test_saga_of_an_older_release_keeps_its_hold_time(pool: db.Pool) -> None:
    await start_saga(pool)
    await pool.execute("UPDATE sagas SET hold_seconds = NULL")
    [saga] = await claim(pool)
    assert saga.hold_seconds == 1200


async def test_finished_saga_is_never_claimed(pool: db.Pool) -> None:
    await start_saga(pool)
    [saga] = await claim(pool)
    await save(pool, saga, SagaState(steps.NEWEST, SagaDirection.FORWARD, None))
    await make_due(pool)
    assert await claim(pool) == []


async def test_saga_of_an_unknown_plan_is_not_claimed(pool: db.Pool) -> None:
    await start_saga(pool)
    await pool.execute("UPDATE sagas SET plan_version = $1", max(steps.PLANS) + 1)
    assert await claim(pool) == []


async def test_concurrent_claims_do_not_wait(pool: db.Pool) -> None:
    """Two processes share the due sagas."""
    ids = {await start_saga(pool) for _ in range(5)}
    async with pool.acquire() as one, pool.acquire() as other, one.transaction():
        first = await claim(one, "one", limit=2)
        second = await claim(other, "other")
    assert (len(first), len(second)) == (2, 3)
    assert {saga.id for saga in [*first, *second]} == ids


async def test_saga_with_an_expired_lease_is_claimed(pool: db.Pool) -> None:
    saga_id = await start_saga(pool)
    await claim(pool, "one")
    await make_due(pool)
    [saga] = await claim(pool, "other")
    assert (saga.id, saga.version) == (saga_id, 3)


async def test_write_stores_state_and_log_in_order(pool: db.Pool) -> None:
    saga_id = await start_saga(pool)
    [saga] = await claim(pool)
    saga = await save(pool, saga, plan.count_attempt(saga.state), [CALLED], due_in_seconds=30, owner="one")
    stored = await row(pool, saga_id)
    assert (stored["attempts"], stored["lease_owner"], stored["version"]) == (1, "one", 3)
    assert stored["due_in_seconds"] == pytest.approx(30, abs=1)
    following = plan.count_attempt(
        SagaState(steps.NEWEST, SagaDirection.BACKWARD, Step.CHARGE_PAYMENT, 0, Reason.TIMED_OUT)
    )
    detail = "x" * 600
    await save(pool, saga, following, [ANSWERED, StepLogEntry(Step.CHARGE_PAYMENT, Action.UNDO, 1, "unknown", detail)])
    stored = await row(pool, saga_id)
    assert (stored["lease_owner"], stored["version"], stored["finished_at"]) == (None, 4, None)
    *log, last = await logged(pool)
    assert log == [
        ("reserve_inventory", "do", 1, "attempted", None, None),
        ("reserve_inventory", "do", 1, "done", None, json.dumps(ANSWERED.reply)),
    ]
    assert last == ("charge_payment", "undo", 1, "unknown", "x" * 500, None)
    await make_due(pool)
    assert [each.state for each in await claim(pool)] == [following]


async def test_stale_runner_writes_nothing(pool: db.Pool) -> None:
    saga_id = await start_saga(pool)
    [late] = await claim(pool, "one")
    await make_due(pool)
    [present] = await claim(pool, "other")
    before = await row(pool, saga_id)
    with pytest.raises(KeyError):
        await save(pool, late, plan.count_attempt(late.state), [CALLED], owner="one")
    assert (await row(pool, saga_id), await logged(pool)) == (before, [])
    await save(pool, present, plan.count_attempt(present.state), [CALLED], owner="other")


async def test_repeated_write_is_stale(pool: db.Pool) -> None:
    await start_saga(pool)
    [saga] = await claim(pool)
    await save(pool, saga, plan.count_attempt(saga.state), [CALLED], owner="one")
    with pytest.raises(KeyError):
        await save(pool, saga, plan.count_attempt(saga.state), [CALLED], owner="one")
    assert len(await logged(pool)) == 1


async def test_write_returns_a_cancel(pool: db.Pool) -> None:
    saga_id = await start_saga(pool)
    [saga] = await claim(pool)
    saga = await save(pool, saga, plan.count_attempt(saga.state), [CALLED], owner="one")
    assert not saga.cancelled
    await cancel(pool, saga_id)
    saga = await save(pool, saga, saga.state, [ANSWERED], owner="one")
    assert (saga.cancelled, saga.must_compensate) == (Reason.CANCELLED_BY_CUSTOMER, True)


async def test_recorded_reply_of_a_do(pool: db.Pool) -> None:
    """Only a reply of a successful do of the same saga and step is returned."""
    saga_id, other = await start_saga(pool), await start_saga(pool)
    saga = next(each for each in await claim(pool) if each.id == saga_id)
    unknown = StepLogEntry(Step.CHARGE_PAYMENT, Action.DO, 1, "unknown", "no answer")
    saga = await save(pool, saga, saga.state, [ANSWERED, unknown], owner="one")
    async with pool.acquire() as conn:
        assert await store.read_do_reply(conn, saga_id, Step.CHARGE_PAYMENT) is None
        charged = StepLogEntry(Step.CHARGE_PAYMENT, Action.DO, 2, "done", None, {"payment_id": "pay_1"})
        await save(
            pool, saga, saga.state, [charged, StepLogEntry(Step.CHARGE_PAYMENT, Action.UNDO, 1, "done", None, {})]
        )
        replies = [await store.read_do_reply(conn, each, Step.CHARGE_PAYMENT) for each in (saga_id, other)]
        assert replies == [{"payment_id": "pay_1"}, None]


async def needs_operator(pool: db.Pool) -> int:
    async with pool.acquire() as conn:
        return (await queries.measure(conn)).needs_operator


async def test_needs_operator_until_the_next_call(pool: db.Pool) -> None:
    """A call that has failed for too long needs an operator; the time counts from the first failure."""
    saga_id = await start_saga(pool)
    [saga] = await claim(pool)

    async def failed(saga: Saga, operator_in_seconds: float) -> Saga:
        return await save(pool, saga, saga.state, owner="one", operator_in_seconds=operator_in_seconds)

    saga = await failed(saga, 300)
    first = (await row(pool, saga_id))["needs_operator_at"]
    assert (saga.needs_operator, await needs_operator(pool)) == (False, 0)
    saga = await failed(saga, 300)
    assert (await row(pool, saga_id))["needs_operator_at"] == first  # it counts from the first failure
    saga = await failed(saga, 0)
    assert (saga.needs_operator, await needs_operator(pool)) == (True, 1)
    saga = await failed(saga, 300)  # another failure does not move the time
    assert (saga.needs_operator, await needs_operator(pool)) == (True, 1)
    await make_due(pool)
    [saga] = await claim(pool)
    assert saga.needs_operator
    saga = await save(pool, saga, SagaState(steps.NEWEST, SagaDirection.FORWARD, Step.CHARGE_PAYMENT))
    assert (saga.needs_operator, await needs_operator(pool)) == (False, 0)
    assert (await row(pool, saga_id))["needs_operator_at"] is None


async def test_needs_operator_without_a_new_attempt(pool: db.Pool) -> None:
    """The statistics count it as soon as its time has come."""
    await start_saga(pool)
    await pool.execute("UPDATE sagas SET needs_operator_at = clock_timestamp()")
    [saga] = await claim(pool)
    assert (saga.needs_operator, await needs_operator(pool)) == (False, 1)  # the next write returns it


async def test_a_write_renews_a_lease_when_a_third_is_over(pool: db.Pool) -> None:
    """Until then it changes no indexed column, so Postgres adds nothing to the indexes."""
    saga_id = await start_saga(pool)
    [saga] = await claim(pool)
    claimed = await row(pool, saga_id)
    async with pool.acquire() as conn, conn.transaction():
        for _ in range(4):
            saved = await store.save(conn, [SagaWrite(saga, saga.state, [], LEASE_SECONDS, owner="one")])
            (saga,) = saved.values()
        heap_only = await conn.fetchval("SELECT pg_stat_get_xact_tuples_hot_updated('sagas'::regclass)")
    assert heap_only == 4
    assert (await row(pool, saga_id))["next_attempt_at"] == claimed["next_attempt_at"]
    for left_seconds in (LEASE_SECONDS / 2, LEASE_SECONDS * 2):  # the second: Postgres's clock was set back
        query = "UPDATE sagas SET next_attempt_at = clock_timestamp() + make_interval(secs => $1)"
        await pool.execute(query, left_seconds)
        saga = await save(pool, saga, saga.state, due_in_seconds=LEASE_SECONDS, owner="one")
        assert (await row(pool, saga_id))["due_in_seconds"] == LEASE_SECONDS


async def test_cancel_ends_a_pause_but_not_a_lease(pool: db.Pool) -> None:
    leased, paused = await start_saga(pool), await start_saga(pool)
    for saga in await claim(pool):
        owner = "one" if saga.id == leased else None
        await save(pool, saga, saga.state, due_in_seconds=LEASE_SECONDS, owner=owner)
    before = await row(pool, leased)
    for saga_id in (leased, paused):
        await cancel(pool, saga_id)
    assert await row(pool, leased) == before
    assert [saga.id for saga in await claim(pool)] == [paused]


async def test_statistics_of_unfinished_sagas(pool: db.Pool) -> None:
    async with pool.acquire() as conn:
        assert await queries.measure(conn) == ({}, 0.0, 0)
        ids = [await start_saga(pool) for _ in range(3)]
        await pool.execute("UPDATE orders SET status = 'compensating' WHERE id = $1", ids[0])
        await pool.execute("UPDATE sagas SET finished_at = clock_timestamp() WHERE id = $1", ids[1])
        await pool.execute("UPDATE sagas SET started_at = started_at - interval '1 hour' WHERE id = $1", ids[2])
        unfinished, oldest, _ = await queries.measure(conn)
    assert unfinished == {"compensating": 1, "pending": 1}
    assert oldest == pytest.approx(3600, abs=60)

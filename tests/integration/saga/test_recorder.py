"""Sagas that write at the same time: each keeps its own fencing and its own error, and cannot delay its neighbours."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from app import db
from app.errors import StaleLease
from app.orders import store as order_store
from app.orders.model import Order, Reason, Status
from app.orders.store import TracedOrder
from app.saga import steps, store
from app.saga.plan import SagaDirection, SagaState
from app.saga.recorder import Change, Recorder
from app.saga.steps import Action, Step
from app.saga.store import Saga, SagaWrite, StepLogEntry
from tests.harness.orders import somebody_waits, start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

MANY = 12
CHARGED = SagaState(steps.NEWEST, SagaDirection.FORWARD, Step.CHARGE_PAYMENT, attempts=1)
ENDED = SagaState(steps.NEWEST, SagaDirection.FORWARD, None)


async def claimed(pool: db.Pool) -> list[Saga]:
    for _ in range(MANY):
        await start_saga(pool)
    async with db.connection(pool) as conn:
        return await store.claim(conn, "one", steps.PLANS, MANY, 30)


def progress(saga: Saga, detail: str = "fine") -> SagaWrite:
    entry = StepLogEntry(Step.CHARGE_PAYMENT, Action.DO, 1, "attempted", detail)
    return SagaWrite(saga, CHARGED, [entry], due_in_seconds=30, owner="one")


def confirming(recorder: Recorder, saga: Saga) -> "asyncio.Task[Saga]":
    """Record that the saga has ended and its order is confirmed."""
    return changing(recorder, saga, Status.CONFIRMED, None)


def compensating(recorder: Recorder, saga: Saga) -> "asyncio.Task[Saga]":
    """Record that the order is being compensated."""
    return changing(recorder, saga, Status.COMPENSATING, Reason.TIMED_OUT)


def changing(recorder: Recorder, saga: Saga, status: Status, reason: Reason | None) -> "asyncio.Task[Saga]":
    def decide(order: Order) -> Change:
        version = TracedOrder(order_store.with_status(order, status, reason), {})
        return Change(SagaWrite(saga, ENDED, [], due_in_seconds=0, owner=None), [version])

    return asyncio.create_task(recorder.change(saga, decide))


def saving(recorder: Recorder, writes: Sequence[SagaWrite]) -> "list[asyncio.Task[Saga]]":
    return [asyncio.create_task(recorder.save(write)) for write in writes]


async def count(pool: db.Pool, query: str) -> int:
    async with db.connection(pool) as conn:
        return int(await conn.fetchval(f"SELECT count({query}"))


async def confirmed(pool: db.Pool) -> int:
    return await count(
        pool, "*) FROM orders JOIN sagas USING (id) WHERE status = 'confirmed' AND finished_at IS NOT NULL"
    )


async def test_progress_is_saved_together(pool: db.Pool) -> None:
    """The log has every entry, in far fewer transactions than there are sagas."""
    sagas = await claimed(pool)
    saved = await asyncio.gather(*saving(Recorder(pool), [progress(saga) for saga in sagas]))
    assert [(saga.id, saga.version, saga.state) for saga in saved] == [(s.id, s.version + 1, CHARGED) for s in sagas]
    assert await count(pool, "*) FROM saga_steps") == MANY
    assert await count(pool, "DISTINCT xmin::text) FROM saga_steps") < MANY / 2


async def test_ends_are_recorded_together(pool: db.Pool) -> None:
    """Each order is confirmed with its event, in far fewer transactions than there are sagas."""
    recorder, sagas = Recorder(pool), await claimed(pool)
    await asyncio.gather(*(confirming(recorder, saga) for saga in sagas))
    assert await confirmed(pool) == MANY
    assert await count(pool, "*) FROM outbox WHERE type = 'orders.order.confirmed.v1' AND sequence = 2") == MANY
    assert await count(pool, "DISTINCT xmin::text) FROM orders") < MANY / 2


async def test_a_saga_that_was_taken_over_is_left_out_of_the_batch(pool: db.Pool) -> None:
    """Its runner gets StaleLease, and neither saga, log, order nor event is written; its neighbours are."""
    recorder, (first, *others) = Recorder(pool), await claimed(pool)
    zombie = replace(first, version=first.version - 1)
    results = await asyncio.gather(
        *saving(recorder, [progress(saga) for saga in (zombie, *others[:3])]),
        *(confirming(recorder, saga) for saga in (zombie, *others[3:])),
        return_exceptions=True,
    )
    assert [isinstance(result, StaleLease) for result in results] == [True, *[False] * 3, True, *[False] * (MANY - 4)]
    assert await confirmed(pool) == MANY - 4
    written = f"*) FROM outbox WHERE sequence = 2 AND subject = '{first.id}'"
    assert await count(pool, written) == await count(pool, f"*) FROM saga_steps WHERE saga_id = '{first.id}'") == 0


async def test_two_claims_of_one_saga_in_a_batch(pool: db.Pool) -> None:
    """A process claims a saga again that it has lost: the runner of the lost claim writes nothing."""
    recorder, (first, second, *_) = Recorder(pool), await claimed(pool)
    saves = saving(recorder, [progress(replace(first, version=first.version - 1), "lost"), progress(first, "present")])
    changes = [confirming(recorder, replace(second, version=second.version - 1)), compensating(recorder, second)]
    results = await asyncio.gather(*saves, *changes, return_exceptions=True)
    assert [isinstance(result, StaleLease) for result in results] == [True, False, True, False]
    assert await count(pool, "*) FROM saga_steps WHERE detail = 'lost'") == 0
    assert await count(pool, "*) FROM saga_steps WHERE detail = 'present'") == 1
    assert await confirmed(pool) == await count(pool, "*) FROM orders WHERE status = 'confirmed'") == 0
    assert await count(pool, "*) FROM orders WHERE status = 'compensating'") == 1


async def test_a_row_that_postgres_refuses_fails_alone(pool: db.Pool) -> None:
    """Its neighbours are written."""
    sagas = await claimed(pool)
    first, bad, *others = [progress(saga, "a NUL: \0" if number == 1 else "fine") for number, saga in enumerate(sagas)]
    tasks = saving(Recorder(pool), [first, bad, *others])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Saga) for result in results] == [True, False, *[True] * len(others)]
    assert await count(pool, "*) FROM saga_steps") == MANY - 1


async def test_an_order_that_somebody_locks_delays_only_its_own_saga(pool: db.Pool) -> None:
    """The others end while it is still locked."""
    recorder, (locked, *others) = Recorder(pool), await claimed(pool)
    async with db.transaction(pool) as conn:
        await order_store.load(conn, locked.id, lock=True)
        first = confirming(recorder, others[0])
        waiting = confirming(recorder, locked)
        await asyncio.gather(first, *(confirming(recorder, saga) for saga in others[1:]))
        await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "the saga of the locked order")
        assert not waiting.done()
    await waiting
    assert await confirmed(pool) == MANY


async def test_a_saga_that_somebody_locks_delays_only_its_own_save(pool: db.Pool) -> None:
    """The progress of the others is saved while it is still locked."""
    recorder, (locked, *others) = Recorder(pool), await claimed(pool)
    async with db.transaction(pool) as conn:
        await conn.execute("SELECT FROM sagas WHERE id = $1 FOR UPDATE", locked.id)
        first, waiting, *rest = saving(recorder, [progress(saga) for saga in (others[0], locked, *others[1:])])
        await asyncio.gather(first, *rest)
        await wait_until(lambda: somebody_waits(pool), AMPLE_SECONDS, "the save of the locked saga")
        assert not waiting.done()
    assert (await waiting).version == locked.version + 1


async def test_a_runner_that_was_superseded_decides_nothing(pool: db.Pool) -> None:
    """Its order has moved on, so it gets StaleLease; its neighbours are written."""
    recorder, (first, *others) = Recorder(pool), await claimed(pool)
    await compensating(recorder, first)
    results = await asyncio.gather(
        confirming(recorder, others[0]),
        confirming(recorder, first),
        confirming(recorder, others[1]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Saga, StaleLease, Saga]


async def test_a_decision_sees_the_cancel_that_came_before_it(pool: db.Pool) -> None:
    """The order that `decide` gets is the locked one, in a batch too."""
    recorder, sagas = Recorder(pool), await claimed(pool)
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE orders SET cancel_requested_at = clock_timestamp()")
    seen: dict[UUID, object] = {}

    def noting(saga: Saga) -> "asyncio.Task[Saga]":
        def decide(order: Order) -> Change:
            seen[order.id] = order.cancel_reason
            return Change(progress(saga))

        return asyncio.create_task(recorder.change(saga, decide))

    await asyncio.gather(*(noting(saga) for saga in sagas))
    assert list(seen.values()) == ["cancelled-by-customer"] * MANY

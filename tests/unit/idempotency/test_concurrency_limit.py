"""The concurrency limit: so many writes at a time, in order, and a fast failure when Postgres is down."""

import asyncio

import pytest

from app.errors import DatabaseUnavailable, Overloaded
from app.idempotency.concurrency_limit import ConcurrencyLimit
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Crowd:
    """Writes that last until `leave` is set, then raise `failure` if it is set."""

    def __init__(self, slots: int) -> None:
        self.limit = ConcurrencyLimit(slots)
        self.admitted: list[int] = []
        self.leave = asyncio.Event()
        self.failure: Exception | None = None

    async def enter(self, number: int, wait_seconds: float = AMPLE_SECONDS) -> None:
        async with self.limit.slot(wait_seconds):
            self.admitted.append(number)
            await self.leave.wait()
            if self.failure:
                raise self.failure

    def send(self, number: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self.enter(number))

    async def until_admitted(self, *numbers: int) -> None:
        await wait_until(lambda: self.admitted == list(numbers), AMPLE_SECONDS, f"{numbers} admitted")


async def test_writes_run_in_order_within_the_limit() -> None:
    """At most `slots` writes run at a time, in the order of their arrival."""
    crowd = Crowd(2)
    tasks = [crowd.send(number) for number in range(5)]
    await crowd.until_admitted(0, 1)
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.admitted == [0, 1, 2, 3, 4]


async def test_waiting_too_long_is_overloaded() -> None:
    """A write that waits too long for a slot raises Overloaded."""
    crowd = Crowd(1)
    first = crowd.send(0)
    await crowd.until_admitted(0)
    with pytest.raises(Overloaded):
        await crowd.enter(1, wait_seconds=0.01)
    crowd.leave.set()
    await first


async def test_an_outage_fails_all_waiting_writes() -> None:
    """When one write finds Postgres down, the waiting ones fail at once; later ones try again."""
    crowd = Crowd(1)
    tasks = [crowd.send(number) for number in range(3)]
    await crowd.until_admitted(0)
    crowd.failure = DatabaseUnavailable("down")
    crowd.leave.set()
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [DatabaseUnavailable] * 3
    assert crowd.admitted == [0]
    crowd.failure = None
    await crowd.enter(3)
    assert crowd.admitted == [0, 3]


async def test_a_cancelled_write_leaves_its_turn_to_the_next() -> None:
    """A write that is cancelled while it waits does not take a slot."""
    crowd = Crowd(1)
    tasks = [crowd.send(number) for number in range(3)]
    await crowd.until_admitted(0)
    tasks.pop(1).cancel()
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.admitted == [0, 2]

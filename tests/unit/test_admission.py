"""The line before Postgres: so many at a time, in order, and nobody waits for a database that is known to be out."""

import asyncio

import pytest

from app.errors import DatabaseUnavailable, Overloaded
from app.idempotency.concurrency_limit import ConcurrencyLimit
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Crowd:
    """Writes that each last until `leave` is set; `failure` is what they then come to."""

    def __init__(self, places: int) -> None:
        self.admission = ConcurrencyLimit(places)
        self.admitted: list[int] = []
        self.leave = asyncio.Event()
        self.failure: Exception | None = None

    async def enter(self, number: int, wait_seconds: float = AMPLE_SECONDS) -> None:
        async with self.admission.slot(wait_seconds):
            self.admitted.append(number)
            await self.leave.wait()
            if self.failure:
                raise self.failure

    def send(self, number: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self.enter(number))

    async def until_admitted(self, *numbers: int) -> None:
        await wait_until(lambda: self.admitted == list(numbers), AMPLE_SECONDS, f"{numbers} admitted")


async def test_so_many_go_on_at_a_time_and_the_others_in_the_order_they_came() -> None:
    crowd = Crowd(2)
    tasks = [crowd.send(number) for number in range(5)]
    await crowd.until_admitted(0, 1)
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.admitted == [0, 1, 2, 3, 4]


async def test_whoever_waited_long_enough_is_told_that_there_is_no_place() -> None:
    crowd = Crowd(1)
    first = crowd.send(0)
    await crowd.until_admitted(0)
    with pytest.raises(Overloaded):
        await crowd.enter(1, wait_seconds=0.01)
    crowd.leave.set()
    await first


async def test_those_who_waited_when_postgres_was_found_out_go_home_and_later_ones_try_again() -> None:
    crowd = Crowd(1)
    tasks = [crowd.send(number) for number in range(3)]
    await crowd.until_admitted(0)
    crowd.failure = DatabaseUnavailable("out")
    crowd.leave.set()
    assert [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)] == [DatabaseUnavailable] * 3
    assert crowd.admitted == [0]
    crowd.failure = None
    await crowd.enter(3)
    assert crowd.admitted == [0, 3]


async def test_whoever_gives_up_in_the_line_leaves_the_place_to_the_next() -> None:
    crowd = Crowd(1)
    tasks = [crowd.send(number) for number in range(3)]
    await crowd.until_admitted(0)
    tasks.pop(1).cancel()
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.admitted == [0, 2]

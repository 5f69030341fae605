"""One look serves all callers, while it runs and for a second after, and probes leave the event loop to requests."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from app.api.health import COUNTED_SECONDS, COUNTING_SHARE, FRESH_SECONDS, PROBES_A_TURN, Health, SharedCall
from app.errors import DatabaseUnavailable
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Looks:
    """Counts looks, on a clock that a test moves. Each look takes `takes_seconds`, and ends when `may_end` is set."""

    def __init__(self) -> None:
        self.number = 0
        self.now = 100.0
        self.takes_seconds = 0.0
        self.error: Exception | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def look(self) -> int:
        self.number += 1
        await self.may_end.wait()
        self.now += self.takes_seconds
        if self.error is not None:
            raise self.error
        return self.number

    def clock(self) -> float:
        return self.now


async def test_concurrent_callers_share_one_look() -> None:
    """Callers that come while a look runs get its result."""
    looks = Looks()
    flight = SharedCall(looks.look, clock=looks.clock)
    looks.may_end.clear()
    asking = [asyncio.create_task(flight()) for _ in range(300)]
    await wait_until(lambda: looks.number, AMPLE_SECONDS, "a look")
    looks.may_end.set()
    assert set(await asyncio.gather(*asking)) == {1}


async def test_the_first_caller_may_be_cancelled() -> None:
    """The look continues for the other callers."""
    looks = Looks()
    flight = SharedCall(looks.look, clock=looks.clock)
    looks.may_end.clear()
    first, second = asyncio.create_task(flight()), asyncio.create_task(flight())
    await wait_until(lambda: looks.number, AMPLE_SECONDS, "a look")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    looks.may_end.set()
    assert await second == 1


async def test_a_look_stays_fresh_for_a_second() -> None:
    """Callers within that time get the same result."""
    looks = Looks()
    flight = SharedCall(looks.look, clock=looks.clock)
    for number, later in enumerate((0.0, 0.9 * FRESH_SECONDS, 0.1 * FRESH_SECONDS)):
        looks.now += later
        assert await flight() == (1 if number < 2 else 2)


async def test_a_failed_look_fails_for_all_callers() -> None:
    """A caller after the fresh time starts another look."""
    looks = Looks()
    flight = SharedCall(looks.look, clock=looks.clock)
    looks.error = DatabaseUnavailable("down")
    failed = await asyncio.gather(*(flight() for _ in range(3)), return_exceptions=True)
    assert (failed, looks.number) == ([looks.error] * 3, 1)
    looks.error = None
    looks.now += FRESH_SECONDS
    assert await flight() == 2


@pytest.mark.parametrize(("takes_seconds", "rest_seconds"), [(0.01, FRESH_SECONDS), (0.2, 4.0), (5.0, COUNTED_SECONDS)])
async def test_a_slow_look_is_reused_for_longer(takes_seconds: float, rest_seconds: float) -> None:
    """Looks take at most their share of the time."""
    looks = Looks()
    looks.takes_seconds = takes_seconds
    flight = SharedCall(looks.look, COUNTING_SHARE, looks.clock)
    assert await flight() == 1
    looks.now += rest_seconds - 0.001
    assert await flight() == 1
    looks.now += 0.002
    assert await flight() == 2


async def test_closing_cancels_a_look() -> None:
    """Its callers are cancelled."""
    looks = Looks()
    flight = SharedCall(looks.look, clock=looks.clock)
    looks.may_end.clear()
    asking = asyncio.create_task(flight())
    await wait_until(lambda: looks.number, AMPLE_SECONDS, "a look")
    await flight.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_many_probes_do_not_fill_the_event_loop() -> None:
    """Each iteration answers a few probes only."""
    answered = 0

    async def count() -> None:
        pass

    async def probe() -> None:
        nonlocal answered
        await health.readiness()
        answered += 1

    health = Health({}, frozenset(), CollectorRegistry(), count)
    await health.readiness()
    crowd = [asyncio.create_task(probe()) for _ in range(300)]
    for _ in range(20):
        before = answered
        await asyncio.sleep(0)
        assert answered - before <= PROBES_A_TURN
    await asyncio.gather(*crowd)
    assert answered == 300
    await health.close()

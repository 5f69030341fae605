"""One run serves all callers, during the run and for a second after, and probes leave the event loop to requests."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from app.api.health import (
    COUNTED_SECONDS,
    COUNTING_SHARE,
    FRESH_SECONDS,
    PROBES_PER_TURN,
    Encoding,
    Health,
    SharedCall,
    choose_encoding,
)
from app.errors import DatabaseUnavailable
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Runs:
    """Counts runs, on a clock that a test moves. Each run takes `takes_seconds`, and ends when `may_end` is set."""

    def __init__(self) -> None:
        self.number = 0
        self.now = 100.0
        self.takes_seconds = 0.0
        self.error: Exception | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def call(self) -> int:
        self.number += 1
        await self.may_end.wait()
        self.now += self.takes_seconds
        if self.error is not None:
            raise self.error
        return self.number

    def clock(self) -> float:
        return self.now


async def test_concurrent_callers_share_one_run() -> None:
    """Callers that come during a run get its result."""
    runs = Runs()
    shared_call = SharedCall(runs.call, clock=runs.clock)
    runs.may_end.clear()
    asking = [asyncio.create_task(shared_call()) for _ in range(300)]
    await wait_until(lambda: runs.number, AMPLE_SECONDS, "a run")
    runs.may_end.set()
    assert set(await asyncio.gather(*asking)) == {1}


async def test_the_first_caller_may_be_cancelled() -> None:
    """The run continues for the other callers."""
    runs = Runs()
    shared_call = SharedCall(runs.call, clock=runs.clock)
    runs.may_end.clear()
    first, second = asyncio.create_task(shared_call()), asyncio.create_task(shared_call())
    await wait_until(lambda: runs.number, AMPLE_SECONDS, "a run")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    runs.may_end.set()
    assert await second == 1


async def test_a_result_stays_fresh_for_a_second() -> None:
    """Callers within that time get the same result."""
    runs = Runs()
    shared_call = SharedCall(runs.call, clock=runs.clock)
    for number, later in enumerate((0.0, 0.9 * FRESH_SECONDS, 0.1 * FRESH_SECONDS)):
        runs.now += later
        assert await shared_call() == (1 if number < 2 else 2)


async def test_a_failed_run_fails_for_all_callers() -> None:
    """A caller after the fresh time starts another run."""
    runs = Runs()
    shared_call = SharedCall(runs.call, clock=runs.clock)
    runs.error = DatabaseUnavailable("down")
    failed = await asyncio.gather(*(shared_call() for _ in range(3)), return_exceptions=True)
    assert (failed, runs.number) == ([runs.error] * 3, 1)
    runs.error = None
    runs.now += FRESH_SECONDS
    assert await shared_call() == 2


@pytest.mark.parametrize(("takes_seconds", "rest_seconds"), [(0.01, FRESH_SECONDS), (0.2, 4.0), (5.0, COUNTED_SECONDS)])
async def test_a_slow_result_is_reused_for_longer(takes_seconds: float, rest_seconds: float) -> None:
    """Runs take at most their share of the time."""
    runs = Runs()
    runs.takes_seconds = takes_seconds
    shared_call = SharedCall(runs.call, COUNTING_SHARE, runs.clock)
    assert await shared_call() == 1
    runs.now += rest_seconds - 0.001
    assert await shared_call() == 1
    runs.now += 0.002
    assert await shared_call() == 2


async def test_closing_cancels_a_run() -> None:
    """Its callers are cancelled."""
    runs = Runs()
    shared_call = SharedCall(runs.call, clock=runs.clock)
    runs.may_end.clear()
    asking = asyncio.create_task(shared_call())
    await wait_until(lambda: runs.number, AMPLE_SECONDS, "a run")
    await shared_call.close()
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

    health = Health({}, frozenset(), CollectorRegistry(), SharedCall(count))
    await health.readiness()
    crowd = [asyncio.create_task(probe()) for _ in range(300)]
    for _ in range(20):
        before = answered
        await asyncio.sleep(0)
        assert answered - before <= PROBES_PER_TURN
    await asyncio.gather(*crowd)
    assert answered == 300
    await health.close()


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("", Encoding.TEXT),
        ("*/*", Encoding.TEXT),
        ("text/plain", Encoding.TEXT),
        ("application/openmetrics-text", Encoding.OPENMETRICS),
        ("text/plain;q=0.5, Application/OpenMetrics-Text; version=1.0.0", Encoding.OPENMETRICS),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.9", Encoding.TEXT),
        ("application/openmetrics-text;q=0", Encoding.TEXT),
        ("application/openmetrics-text;q=nan", Encoding.TEXT),
        (";;,=", Encoding.TEXT),
    ],
)
def test_the_accept_header_chooses_the_encoding(accept: str, encoding: Encoding) -> None:
    assert choose_encoding(accept) is encoding

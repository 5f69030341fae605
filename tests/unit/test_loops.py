"""Background loops: run at once while there is work, and back off after errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from app.errors import BrokerUnavailable
from app.loops import Loop, full_jitter
from tests.harness.wait import AMPLE_SECONDS, wait_until

NEVER_SECONDS = 3600.0  # longer than any test, so that no poll can cause what a test observes


class Work:
    """Follows the script, one entry per call; then it has no work."""

    def __init__(self, *script: int | BaseException) -> None:
        self.calls = 0
        self._script = iter(script)

    async def run_once(self) -> int:
        self.calls += 1
        match next(self._script, 0):
            case BaseException() as error:
                raise error
            case done:
                return done

    async def called(self, times: int) -> None:
        await wait_until(lambda: self.calls >= times, AMPLE_SECONDS, f"call number {times}")


@contextlib.asynccontextmanager
async def running(run_once: Callable[[], Awaitable[int]], poll_seconds: float = NEVER_SECONDS) -> AsyncIterator[Loop]:
    loop = Loop("test", run_once, poll_seconds)
    task = asyncio.create_task(loop.run())
    try:
        yield loop
    finally:
        loop.stop()
        await task


@pytest.mark.parametrize(
    ("attempt", "ceiling"), [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 10.0), (7, 10.0), (10**9, 10.0)]
)
def test_full_jitter(attempt: int, ceiling: float) -> None:
    """A pause is uniform up to a ceiling that doubles until the cap."""
    pauses = [full_jitter(attempt, 0.5, 10) for _ in range(1000)]
    assert min(pauses) > 0
    assert max(pauses) <= ceiling
    assert min(pauses) < ceiling / 2 < max(pauses)


async def test_the_first_run_is_immediate() -> None:
    """A loop runs its work immediately at its start."""
    work = Work()
    async with running(work.run_once):
        await work.called(1)


async def test_there_is_no_pause_while_there_is_work() -> None:
    """A loop does not pause while there is work."""
    work = Work(200, 200, 1)
    async with running(work.run_once):
        await work.called(4)
    assert work.calls == 4


async def test_a_cancelled_loop_ends() -> None:
    """Cancelling a loop ends it."""
    task = asyncio.create_task(Loop("test", Work().run_once, NEVER_SECONDS).run())
    blocked = asyncio.create_task(Loop("test", asyncio.Event().wait, NEVER_SECONDS).run())
    await asyncio.sleep(0)
    for each in (task, blocked):
        each.cancel()
    await asyncio.wait([task, blocked])
    assert task.cancelled()
    assert blocked.cancelled()


async def test_without_work_the_loop_polls() -> None:
    """Without work, a loop runs again at the next poll."""
    work = Work()
    async with running(work.run_once, poll_seconds=0.001):
        await work.called(3)


async def test_a_wake_up_ends_the_sleep() -> None:
    """A wake-up ends the sleep at once."""
    work = Work()
    async with running(work.run_once) as loop:
        for calls in (2, 3, 4):
            await work.called(calls - 1)
            loop.wake()
            await work.called(calls)


async def test_a_wake_up_during_the_work_is_not_lost() -> None:
    """A wake-up while the work runs starts another run."""
    calls = 0

    async def woken_meanwhile() -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            loop.wake()
        return 0

    async with running(woken_meanwhile) as loop:
        await wait_until(lambda: calls == 2, AMPLE_SECONDS, "second look")


async def test_a_wake_up_can_be_delayed() -> None:
    """`wake_in` wakes the loop after a delay."""
    work = Work()
    async with running(work.run_once) as loop:
        await work.called(1)
        loop.wake_in(0.01)
        await work.called(2)


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("out"), ValueError("a bug"), TimeoutError(), asyncio.CancelledError()]
)
async def test_no_error_ends_the_loop(error: BaseException) -> None:
    """A loop continues after any error."""
    work = Work(error, error, 1)
    async with running(work.run_once):
        await work.called(4)


async def test_wake_ups_do_not_end_the_pause_after_an_error() -> None:
    """Wake-ups do not shorten the pause after an error."""
    work = Work(*[BrokerUnavailable("out")] * 4)
    async with running(work.run_once) as loop:
        wake_ups = 0
        while work.calls < 4:
            loop.wake()
            wake_ups += 1
            await asyncio.sleep(0)  # one iteration of the event loop
    assert wake_ups > 100


async def test_stop_ends_the_pause_after_an_error() -> None:
    """`stop` ends the pause after an error, without another attempt."""
    work = Work(*[BrokerUnavailable("out")] * 1000)
    async with running(work.run_once) as loop:
        await work.called(2)
        loop.stop()
        attempts = work.calls
    assert work.calls == attempts


async def test_stop_lets_the_current_work_finish() -> None:
    """`stop` lets the current work finish, and starts no more."""
    started, may_end = asyncio.Event(), asyncio.Event()
    finished = 0

    async def slow() -> int:
        nonlocal finished
        started.set()
        await may_end.wait()
        finished += 1
        return 1

    async with running(slow) as loop:
        await started.wait()
        loop.stop()
        assert finished == 0
        may_end.set()
    assert finished == 1


async def test_a_loop_stopped_before_it_ran_does_nothing() -> None:
    """A loop that was stopped before it ran does nothing."""
    work = Work()
    loop = Loop("test", work.run_once, NEVER_SECONDS)
    loop.stop()
    await loop.run()
    assert work.calls == 0


async def test_only_a_run_without_an_error_is_a_success() -> None:
    work, successes = Work(BrokerUnavailable("down"), RuntimeError("defect"), 1, 0), 0

    def succeed() -> None:
        nonlocal successes
        successes += 1

    loop = Loop("test", work.run_once, NEVER_SECONDS, succeed)
    task = asyncio.create_task(loop.run())
    await wait_until(lambda: successes == 2, AMPLE_SECONDS, "two successes")
    assert work.calls == 4
    loop.stop()
    await task

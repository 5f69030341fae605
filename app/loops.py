"""Background loops: work while there is work, sleep until woken or until the next poll, survive any error.

Every component is a class with `run_once() -> int` (how much it did). A `Loop` drives it; tests call `run_once`.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from app.errors import OrdersError
from app.values import immutable

log = structlog.get_logger(__name__)


def full_jitter(attempt: int, base_seconds: float, cap_seconds: float) -> float:
    """Return the pause after failed attempt number `attempt`: uniform in (0, min(cap, base · 2^(attempt-1))].

    Full jitter spreads the retries of calls that failed together; see the AWS Architecture Blog, "Exponential Backoff
    And Jitter".
    """
    ceiling = min(cap_seconds, base_seconds * 2.0 ** min(attempt - 1, 60))
    return ceiling * (1.0 - random.random())  # noqa: S311 - spreading load needs no secrecy


@immutable
class Backoff:
    """Exponential backoff with full jitter: pauses up to `base_seconds`, doubling up to `cap_seconds`."""

    base_seconds: float
    cap_seconds: float

    def pause(self, attempt: int) -> float:
        """Return how many seconds to wait after failed attempt number `attempt`, counted from 1."""
        return full_jitter(attempt, self.base_seconds, self.cap_seconds)


async def in_thread(function: Callable[..., None], *args: Any) -> None:
    """Run a blocking function in a thread, to its end even if the caller is cancelled: a thread cannot be stopped."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


class Loop:
    """Runs `run_once` repeatedly until `stop`. After an error it pauses (0.1 s doubling to 5 s, jittered).

    `succeeded` is called after every run without an error. It must not raise.
    """

    def __init__(
        self,
        name: str,
        run_once: Callable[[], Awaitable[int]],
        poll_seconds: float,
        succeeded: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._run_once = run_once
        self._poll_seconds = poll_seconds
        self._succeeded = succeeded
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()

    def wake(self) -> None:
        """Run now instead of at the next poll. Call it from the event loop's thread, at any time."""
        self._woken.set()

    def wake_in(self, seconds: float) -> None:
        """Wake after `seconds`, when work will be due."""
        asyncio.get_running_loop().call_later(seconds, self._woken.set)

    def stop(self) -> None:
        """Let the current `run_once` finish, then end."""
        self._stopping.set()
        self._woken.set()

    async def run(self) -> None:
        """Run until `stop`."""
        failures = 0
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                done = await self._run_once()
            except OrdersError as error:
                failures += 1
                log.warning("loop.paused", loop=self.name, code=error.code, error=str(error))
            except asyncio.CancelledError:
                # aiormq raises this in callers that wait on a connection when it drops the connection. If this task was
                # not cancelled, it is an ordinary error, and must not end the loop silently.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                failures += 1
                log.warning("loop.paused", loop=self.name, code="cancelled", error="a call was cancelled below us")
            except Exception:
                failures += 1
                log.exception("loop.failed", loop=self.name)
            else:
                failures = 0
                self._succeeded()
                if not done:
                    await self._sleep(self._poll_seconds)
            if failures:
                # Do not wait on the wake-up event: while a dependency is down, every new order would end the pause.
                await self._pause(full_jitter(failures, 0.1, 5))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

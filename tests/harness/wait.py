"""Wait for a condition, with a deadline. Only this module of the tests sleeps."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

AMPLE_SECONDS = 60.0  # the patience of every wait for something that must happen, even on a slow machine
POLL_SECONDS = 0.02


@overload
async def wait_until(condition: Callable[[], Awaitable[T]], deadline_seconds: float, what: str) -> T: ...
@overload
async def wait_until(condition: Callable[[], T], deadline_seconds: float, what: str) -> T: ...
async def wait_until(condition: Callable[[], object], deadline_seconds: float, what: str) -> object:
    """Poll `condition` (plain or async) until it is true, and return its result.

    Its exceptions are raised at once. After the deadline, raises AssertionError with `what` and the last result. The
    condition is always checked once after the deadline, because the machine may have paused since the last check.
    """
    deadline = time.monotonic() + deadline_seconds
    while True:
        late = time.monotonic() > deadline
        answer = condition()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if late:
            raise AssertionError(f"not within {deadline_seconds:g} s: {what} (last seen: {value!r})")
        await asyncio.sleep(POLL_SECONDS)

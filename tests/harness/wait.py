"""Waits for a condition, with a deadline: the only place in the tests that sleeps."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

AMPLE_SECONDS = 60.0  # for what must happen, on however slow a machine
POLL_SECONDS = 0.02


@overload
async def wait_until(condition: Callable[[], Awaitable[T]], deadline_seconds: float, what: str) -> T: ...
@overload
async def wait_until(condition: Callable[[], T], deadline_seconds: float, what: str) -> T: ...
async def wait_until(condition: Callable[[], object], deadline_seconds: float, what: str) -> object:
    """Poll `condition` (plain or async) until it is true, and return what it returned.

    An exception that it raises goes through at once. Past the deadline: AssertionError, naming `what`; but never
    without a look after it, since the machine may have stood still between the last look and the deadline.
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

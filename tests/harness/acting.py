"""Actions on an order at a chosen crash point of its saga."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar
from uuid import UUID

from app.db import Pool
from tests.harness.databases import patient_pool

T = TypeVar("T")


class ActAt(Generic[T]):
    """An action at a crash point of a runner; it has committed when the runner continues.

    A crash point is not a coroutine, so the action has its own thread and connection. `answer`: its result.
    """

    def __init__(self, database_url: str, point: str, act: Callable[[Pool, UUID], Awaitable[T]]) -> None:
        self.order_id: UUID | None = None
        self.answer: T | Exception | None = None
        self._url = database_url
        self._point = point
        self._perform = act

    def __call__(self, passed: str) -> None:
        if passed == self._point and self.answer is None:
            with ThreadPoolExecutor(1) as thread:
                self.answer = thread.submit(asyncio.run, self._act()).result()

    async def _act(self) -> T | Exception:
        assert self.order_id is not None
        async with patient_pool(self._url, 1) as pool:
            try:
                return await self._perform(pool, self.order_id)
            except Exception as error:  # noqa: BLE001 - it is for the test to judge
                return error

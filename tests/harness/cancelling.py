"""Customers that cancel at a chosen instant, without HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from app.db import Pool
from app.orders.models import Order
from app.saga import cancellation
from tests.harness.databases import patient_pool
from tests.harness.orders import TENANT

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def cancel(pool: Pool, order_id: UUID, tenant: str = TENANT) -> Order:
    """Cancel as the API does, in a transaction of its own."""
    async with cancel_under_way(pool, order_id, tenant) as order:
        return order


@contextlib.asynccontextmanager
async def cancel_under_way(pool: Pool, order_id: UUID, tenant: str = TENANT) -> AsyncIterator[Order]:
    """Cancel; the commit comes with the end of the block."""
    async with pool.acquire() as conn, conn.transaction():
        yield (await cancellation.cancel(conn, tenant, order_id, TRACE)).order


class CancelAt:
    """A checkpoint of a runner at which the customer cancels: committed by the time the runner goes on.

    A checkpoint is no coroutine, so the cancel has a thread and a connection of its own. `answer`: what it came to.
    """

    def __init__(self, database_url: str, point: str) -> None:
        self.order_id: UUID | None = None
        self.answer: Order | Exception | None = None
        self._url = database_url
        self._point = point

    def __call__(self, passed: str) -> None:
        if passed == self._point and self.answer is None:
            with ThreadPoolExecutor(1) as thread:
                self.answer = thread.submit(asyncio.run, self._cancel()).result()

    @property
    def status(self) -> str:
        """The order's status in the answer."""
        assert isinstance(self.answer, Order), repr(self.answer)
        return self.answer.status

    async def _cancel(self) -> Order | Exception:
        assert self.order_id is not None
        async with patient_pool(self._url, 1) as pool:
            try:
                return await cancel(pool, self.order_id)
            except Exception as error:  # noqa: BLE001 - it is for the test to judge
                return error

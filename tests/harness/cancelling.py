"""Customers that cancel at a chosen crash point, without HTTP."""

import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

from app.db import Pool
from app.orders.model import Order
from app.saga import cancel as saga_cancel
from tests.harness.acting import ActAt
from tests.harness.orders import TENANT

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def cancel(pool: Pool, order_id: UUID, tenant: str = TENANT) -> Order:
    """Cancel as the API does, in a transaction of its own."""
    async with cancel_under_way(pool, order_id, tenant) as order:
        return order


@contextlib.asynccontextmanager
async def cancel_under_way(pool: Pool, order_id: UUID, tenant: str = TENANT) -> AsyncIterator[Order]:
    """Cancel, and commit at the end of the block."""
    async with pool.acquire() as conn, conn.transaction():
        yield (await saga_cancel.cancel(conn, tenant, order_id, TRACE)).order


class CancelAt(ActAt[Order]):
    """A customer's cancel at a crash point of a runner."""

    def __init__(self, database_url: str, point: str) -> None:
        super().__init__(database_url, point, cancel)

    @property
    def status(self) -> str:
        """Return the order's status in the answer."""
        assert isinstance(self.answer, Order), repr(self.answer)
        return self.answer.status

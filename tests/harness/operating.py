"""Operators that act at a chosen instant, without HTTP and without a command line."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

from app.db import Pool
from app.operations import sagas
from app.operations.audit import Operator
from app.operations.sagas import Outcome
from tests.harness.databases import patient_pool

OPERATOR = Operator("cli:ada", "the warehouse burns")


async def compensate(pool: Pool, order_id: UUID) -> Outcome:
    """Turn a saga back."""
    return await sagas.compensate(pool, order_id, OPERATOR, {})


async def retry(pool: Pool, order_id: UUID) -> Outcome:
    """End a saga's pause."""
    return await sagas.retry(pool, order_id, OPERATOR)


async def audit_rows(pool: Pool) -> list[tuple[Any, ...]]:
    """Return what is on record: actor, action, order, reason, outcome."""
    rows = await pool.fetch("SELECT actor, action, order_id, reason, outcome FROM operator_actions ORDER BY id")
    return [tuple(row) for row in rows]


async def recorded(pool: Pool) -> list[str]:
    """Return what is on record, in short: `retry due`."""
    return [f"{action} {outcome}" for _, action, _, _, outcome in await audit_rows(pool)]


class CompensateAt:
    """A checkpoint of a runner at which an operator turns the saga back: committed by the time the runner goes on.

    A checkpoint is no coroutine, so the operator has a thread and a connection. `outcome`: what it came to.
    """

    def __init__(self, database_url: str, point: str) -> None:
        self.order_id: UUID | None = None
        self.outcome: Outcome | Exception | None = None
        self._url = database_url
        self._point = point

    def __call__(self, passed: str) -> None:
        if passed == self._point and self.outcome is None:
            with ThreadPoolExecutor(1) as thread:
                self.outcome = thread.submit(asyncio.run, self._compensate()).result()

    async def _compensate(self) -> Outcome | Exception:
        assert self.order_id is not None
        async with patient_pool(self._url, 1) as pool:
            try:
                return await compensate(pool, self.order_id)
            except Exception as error:  # noqa: BLE001 - it is for the test to judge
                return error

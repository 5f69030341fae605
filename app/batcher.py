"""Gather what is concurrent: while one batch runs, the next one gathers. Callers submit a row and get its own result.

    submit → waits → a batch of all that wait runs → each caller gets the result of its row

There is no timer. If no batch runs, a row starts at once and alone, so latency at low load stays what it was. Under
load, a batch holds what came while the last one ran: the slower the server, the larger the batch. (A timer of 2 ms
halved the throughput of orders.)

What a caller can rely on:

- *Own result.* `run` returns one result for each row, in their order.
- *Own error.* If `run` raises, one of its rows may be to blame. Each caller gets Alone, writes its row by itself, and
  meets the error of that row or none. A row that was alone in its batch gets the error itself. If Postgres is
  unavailable, all callers get that error.
- *Cancelled.* If its caller leaves, a row that still waits is dropped. A row in a running batch is written all the
  same, because the batch is its neighbours' too; it is as if the caller had left just after the commit.
- *Bounded.* A batch has at most `size` rows, and at most `waiting` rows wait, each for at most `patience_seconds`:
  then it gets Overloaded. So do the rows that come while a batch takes longer than that.

A batch runs in a task of its own, outside its callers' trace and log context. Use a batcher from one event loop.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

import structlog

from app.errors import LocksTaken, Overloaded, Unavailable
from app.values import immutable

log = structlog.get_logger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


@immutable
class Alone:
    """The result of a row that was not written with the others: its caller has to write it."""


Member = tuple[Row, asyncio.Future[Result | Alone]]
Waiting = tuple[float, Member[Row, Result]]  # since when, on the loop's clock


@immutable
class BatcherConfig:
    """The bounds. `size`: rows of a batch. `waiting`: rows that wait. `patience_seconds`: how long a row waits."""

    size: int
    waiting: int = 10_000
    patience_seconds: float = 3.0


class Batcher(Generic[Row, Result]):
    """Runs one batch at a time."""

    def __init__(
        self, run: Callable[[Sequence[Row]], Awaitable[Sequence[Result | Alone]]], config: BatcherConfig
    ) -> None:
        self._run = run
        self._config = config
        self._waiting: deque[Waiting[Row, Result]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_late = False

    async def submit(self, row: Row) -> Result | Alone:
        """Return the result of the row. Raises Overloaded, and what `run` raises for this row."""
        if self._is_late or len(self._waiting) >= self._config.waiting:
            raise Overloaded("too many writes wait for Postgres")
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result | Alone] = loop.create_future()
        self._waiting.append((loop.time(), (row, result)))
        if self._task is None:
            self._task = loop.create_task(self._work(), context=Context())
        return await result

    async def _work(self) -> None:
        """Run batches until no row waits."""
        try:
            while batch := self._next_batch():
                await self._run_one(batch)
        finally:
            self._task = None

    def _next_batch(self) -> list[Member[Row, Result]]:
        self._refuse_since(asyncio.get_running_loop().time() - self._config.patience_seconds)
        batch: list[Member[Row, Result]] = []
        while self._waiting and len(batch) < self._config.size:
            _, (row, result) = self._waiting.popleft()
            if not result.done():  # its caller has left
                batch.append((row, result))
        return batch

    async def _run_one(self, batch: list[Member[Row, Result]]) -> None:
        late = asyncio.get_running_loop().call_later(self._config.patience_seconds, self._refuse_all)
        try:
            results = await self._results([row for row, _ in batch])
            for (_, waiting), result in zip(batch, results, strict=True):
                if not waiting.done():
                    waiting.set_result(result)
        except Exception as error:  # noqa: BLE001 - every caller of the batch raises it
            for _, waiting in batch:
                if not waiting.done():
                    waiting.set_exception(error)
        finally:
            late.cancel()
            self._is_late = False
            for _, waiting in batch:
                waiting.cancel()  # of those without a result: the batch was cancelled, as the process ends

    async def _results(self, rows: Sequence[Row]) -> Sequence[Result | Alone]:
        try:
            return await self._run(rows)
        except Unavailable:
            raise
        except Exception as error:
            if len(rows) == 1 and not isinstance(error, LocksTaken):
                raise
            log.info("batch.split", error=repr(error), rows=len(rows))
            return [Alone()] * len(rows)

    def _refuse_all(self) -> None:
        self._is_late = True
        self._refuse_since(math.inf)

    def _refuse_since(self, since: float) -> None:
        """Refuse the rows that have waited since then, or for longer."""
        while self._waiting and self._waiting[0][0] <= since:
            _, (_, waiting) = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(Overloaded("the writes before this one take too long"))

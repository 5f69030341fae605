"""The batcher: concurrent rows share a batch, and each caller gets its own result."""

import asyncio
import contextvars
from collections.abc import Sequence
from typing import Any

import pytest

from app.batcher import Alone, Batcher, BatcherConfig
from app.errors import DatabaseUnavailable, LocksTaken, Overloaded
from tests.harness.wait import AMPLE_SECONDS, wait_until

NAME = contextvars.ContextVar("NAME", default="nobody")


class Server:
    """Runs batches that end when `answer` is set, with an error if they hold a row of `failing`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.names: list[str] = []
        self.answer = asyncio.Event()
        self.seconds = 0.0
        self.failing: set[int] = set()
        self.error: Exception = ValueError("bad")

    async def run(self, rows: Sequence[int]) -> list[int]:
        self.batches.append(list(rows))
        self.names.append(NAME.get())
        await self.answer.wait()
        await asyncio.sleep(self.seconds)
        if self.failing & set(rows):
            raise self.error
        return [row * 10 for row in rows]

    def batcher(self, size: int = 4, waiting: int = 100, patience_seconds: float = AMPLE_SECONDS) -> Batcher[int, int]:
        return Batcher(self.run, BatcherConfig(size, waiting, patience_seconds))


async def submitted(batcher: Batcher[int, int], *rows: int) -> "list[asyncio.Task[int | Alone]]":
    """Submit rows, each from its own task, and let each task reach its wait."""
    tasks = [asyncio.create_task(batcher.submit(row)) for row in rows]
    await asyncio.sleep(0)
    return tasks


async def first_batch(server: Server, batcher: Batcher[int, int]) -> "list[asyncio.Task[int | Alone]]":
    """Submit row 0, and wait until its batch runs."""
    tasks = await submitted(batcher, 0)
    await wait_until(lambda: len(server.batches) == 1, AMPLE_SECONDS, "the first batch")
    return tasks


async def test_rows_that_come_during_a_batch_share_the_next() -> None:
    """A single row starts at once; what comes while it runs is one batch. Each caller gets its own result."""
    server = Server()
    batcher = server.batcher()
    tasks = await first_batch(server, batcher) + await submitted(batcher, 1, 2, 3)
    server.answer.set()
    assert await asyncio.gather(*tasks) == [0, 10, 20, 30]
    assert server.batches == [[0], [1, 2, 3]]


async def test_a_batch_has_at_most_its_size() -> None:
    """More rows than fit into one batch take several, in the order in which they came."""
    server = Server()
    batcher = server.batcher(size=2)
    tasks = await first_batch(server, batcher) + await submitted(batcher, 1, 2, 3)
    server.answer.set()
    await asyncio.gather(*tasks)
    assert server.batches == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    ("error", "results"),
    [
        (ValueError("bad"), [0, Alone(), Alone(), 30, 40]),  # each meets its own error, or none
        (LocksTaken("taken"), [0, Alone(), Alone(), 30, 40]),
        (DatabaseUnavailable("down"), [0, "down", "down", 30, 40]),  # nobody would fare better alone
    ],
)
async def test_an_error_reaches_the_callers_of_its_batch_only(error: Exception, results: "list[Any]") -> None:
    """The batch after a failed one runs as usual."""
    server = Server()
    batcher = server.batcher(size=2)
    server.failing, server.error = {2}, error
    first = await first_batch(server, batcher)
    tasks = first + await submitted(batcher, 1, 2) + await submitted(batcher, 3, 4)
    server.answer.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) if isinstance(result, Exception) else result for result in found] == results


async def test_a_row_that_was_alone_gets_its_error_at_once() -> None:
    """To run it again would not help, unless it gave way to another transaction's lock."""
    server = Server()
    server.answer.set()
    server.failing = {1}
    with pytest.raises(ValueError, match="bad"):
        await server.batcher().submit(1)
    server.error = LocksTaken("taken")
    assert await server.batcher().submit(1) == Alone()


async def test_a_row_whose_caller_left_while_it_waited_is_dropped() -> None:
    """Its neighbours are not affected."""
    server = Server()
    batcher = server.batcher()
    tasks = await first_batch(server, batcher) + await submitted(batcher, 1, 2)
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    server.answer.set()
    assert await tasks[2] == 20
    assert server.batches == [[0], [2]]


async def test_a_batch_goes_on_when_a_caller_leaves() -> None:
    """A batch that runs is not cancelled with one of its callers."""
    server = Server()
    batcher = server.batcher()
    running = await first_batch(server, batcher)
    waiting = await submitted(batcher, 1)
    running[0].cancel()
    await asyncio.wait(running)
    server.answer.set()
    assert await waiting[0] == 10


async def test_more_rows_than_may_wait_are_refused() -> None:
    """The bound counts the rows that wait, not those of the running batch."""
    server = Server()
    batcher = server.batcher(waiting=2)
    tasks = await first_batch(server, batcher) + await submitted(batcher, 1, 2)
    with pytest.raises(Overloaded):
        await batcher.submit(3)
    server.answer.set()
    assert await asyncio.gather(*tasks) == [0, 10, 20]


async def test_a_batch_that_takes_too_long_fails_the_rows_behind_it() -> None:
    """What waits is refused, and what comes, until the batch has ended; the batch itself goes on."""
    server = Server()
    batcher = server.batcher(patience_seconds=0.01)
    running = await first_batch(server, batcher)
    waiting = await submitted(batcher, 1)
    with pytest.raises(Overloaded):
        await waiting[0]
    with pytest.raises(Overloaded):
        await batcher.submit(2)
    server.answer.set()
    assert await running[0] == 0
    assert await batcher.submit(3) == 30


async def test_a_row_does_not_wait_for_many_batches() -> None:
    """Its patience is for all batches before it, not for each of them."""
    server = Server()
    server.answer.set()
    server.seconds = 0.06
    batcher = server.batcher(size=1, patience_seconds=0.1)
    results = await asyncio.gather(*await submitted(batcher, 0, 1, 2, 3, 4), return_exceptions=True)
    assert results[0] == 0
    # Two batches take longer than the patience. Whether the second one begins in time depends on the machine.
    assert [type(result) for result in results[2:]] == [Overloaded] * 3


async def test_a_batch_does_not_run_in_its_callers_context() -> None:
    """Neither trace nor log fields of the first caller belong to the whole batch."""
    server = Server()
    server.answer.set()
    NAME.set("the first caller")
    await server.batcher().submit(1)
    assert server.names == ["nobody"]

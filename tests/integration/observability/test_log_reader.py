"""A log reader that stalls or closes stops the log, and nothing else."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator

import httpx
import pytest

from app.demo.embedded_postgres import dying_with_parent
from app.observability.logs import LOG_QUEUE_LINES, BackgroundHandler
from tests.harness.observed import Observed
from tests.harness.ports import free_port
from tests.harness.processes import REPOSITORY
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 1, "unit_price": 1}
ORDERS = 500  # a line of some 200 bytes each; a pipe holds 64 KiB


async def is_live(api: httpx.AsyncClient) -> bool:
    try:
        return (await api.get("/livez")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("goes_away", [False, True], ids=["stalls", "goes away"])
async def test_the_service_outlives_its_log_reader(database_url: str, *, goes_away: bool) -> None:
    """Every order is answered, and the process ends in time; a reader that resumes misses nothing."""
    port, (read_end, write_end) = free_port(), os.pipe()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    env |= {"ORDERS_DATABASE_URL": database_url, "ORDERS_ROLES": "api", "ORDERS_PORT": str(port)}
    command = (*dying_with_parent(signal.SIGKILL), sys.executable, "-m", "app", "serve")
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, env=env, stderr=write_end)
    os.close(write_end)
    async with plain_http(f"http://127.0.0.1:{port}") as api:
        await wait_until(lambda: is_live(api), AMPLE_SECONDS, "the service")
        if goes_away:
            os.close(read_end)
        async with asyncio.timeout(AMPLE_SECONDS):
            for _ in range(ORDERS // 50):
                answers = await asyncio.gather(*(api.post("/orders", json=LINE) for _ in range(50)))
                assert {answer.status_code for answer in answers} == {201}
        assert await is_live(api)
    if goes_away:
        process.terminate()
    else:  # it resumes before the end, because an ending process waits only briefly
        async with asyncio.timeout(AMPLE_SECONDS):
            assert await asyncio.to_thread(count_orders, read_end, process.pid) == ORDERS
    async with asyncio.timeout(AMPLE_SECONDS):
        assert await process.wait() == 0


def count_orders(descriptor: int, pid: int) -> int:
    """Read the log up to the last order, stop the process, read the rest, and count the orders."""
    with open(descriptor, encoding="utf-8") as log:
        seen = 0
        while seen < ORDERS:
            seen += is_order(log.readline())
        os.kill(pid, signal.SIGTERM)
        return seen + sum(map(is_order, log))


def is_order(line: str) -> bool:
    return bool(json.loads(line)["event"] == "order.placed")


@pytest.fixture
def stalled() -> Iterator[tuple[logging.Logger, int]]:
    """A logger whose lines go to a pipe, and the pipe's other end."""
    read_end, write_end = os.pipe()
    logger = logging.getLogger("stalled")
    logger.propagate = False
    logger.handlers[:] = [BackgroundHandler(write_end)]
    yield logger, read_end
    os.close(read_end)


def lines_dropped() -> float:
    """Return how many lines this process has dropped, in other tests too."""
    return Observed().registry.get_sample_value("log_lines_dropped_total") or 0.0


async def test_lines_beyond_the_queue_are_dropped_and_counted(stalled: tuple[logging.Logger, int]) -> None:
    """Lines that do not fit into the queue are dropped, counted, and reported."""
    logger, read_end = stalled
    before = lines_dropped()
    sent = 2 * LOG_QUEUE_LINES
    for number in range(sent):
        logger.warning("%s", f"{number} ".ljust(100, "x"))
    dropped = lines_dropped() - before
    assert 0 < dropped < sent
    seen = b""

    def read() -> bool:
        nonlocal seen
        seen += os.read(read_end, 1 << 20)
        return bool(seen.count(b"x\n") == sent - dropped)

    await wait_until(read, AMPLE_SECONDS, "the lines that were not dropped")
    assert seen.startswith(b"0 ")
    assert sum(int(number) for number in re.findall(rb"log\.lines_dropped: (\d+)\n", seen)) == dropped


async def test_a_reader_that_does_not_block_gets_every_line(stalled: tuple[logging.Logger, int]) -> None:
    """A terminal or a parent process may have made the file non-blocking."""
    logger, read_end = stalled
    handler = next(candidate for candidate in logger.handlers if isinstance(candidate, BackgroundHandler))
    os.set_blocking(handler.descriptor, False)
    before, sent = lines_dropped(), LOG_QUEUE_LINES // 2
    for number in range(sent):
        logger.warning("%s", f"{number} ".ljust(100, "x"))
    seen = b""
    while seen.count(b"\n") < sent:
        seen += await asyncio.to_thread(os.read, read_end, 1 << 20)
    assert lines_dropped() == before
    assert [int(line.split()[0]) for line in seen.splitlines()] == list(range(sent))


async def test_the_service_runs_without_a_stderr(database_url: str) -> None:
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    env |= {"ORDERS_DATABASE_URL": database_url, "ORDERS_ROLES": "api", "ORDERS_PORT": str(port)}
    command = " ".join((*dying_with_parent(signal.SIGKILL), sys.executable, "-m", "app", "serve", "2>&-"))
    process = await asyncio.create_subprocess_shell(f"exec {command}", cwd=REPOSITORY, env=env)
    async with plain_http(f"http://127.0.0.1:{port}") as api:
        await wait_until(lambda: is_live(api), AMPLE_SECONDS, "the service")
        assert (await api.post("/orders", json=LINE)).status_code == 201
    process.terminate()
    async with asyncio.timeout(AMPLE_SECONDS):
        assert await process.wait() == 0

"""A clean broker per test: this worker's own vhost, or the one that TEST_RABBITMQ_URL names, for one test at a time."""

import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiormq
import filelock

from tests.harness.run import Run, given

QUEUES = ("orders.saga", "orders.saga.dlq", "orders.heard")
EXCHANGES = ("orders.events", "orders.dlx")


@contextlib.asynccontextmanager
async def clean(run: Run) -> AsyncIterator[str]:
    """Lend the URL of a vhost without any of the service's queues and exchanges."""
    shared = given("TEST_RABBITMQ_URL", 5672)
    with alone_on(shared) if shared else contextlib.nullcontext():
        url = shared or run.server("rabbitmq") + run.worker.replace("gw", "w")
        await remove_topology(url)
        yield url


def alone_on(url: str) -> filelock.BaseFileLock:
    """Return a lock between all tests, of all runs, that use this URL."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return filelock.FileLock(Path(tempfile.gettempdir()) / f"orders-test-{name}.lock")


async def remove_topology(url: str) -> None:
    """Remove the queues and exchanges of the service and the tests. They need not exist."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        for queue in QUEUES:
            await channel.queue_delete(queue)
        for exchange in EXCHANGES:
            await channel.exchange_delete(exchange)
    finally:
        await connection.close()

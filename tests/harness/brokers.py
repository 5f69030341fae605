"""A clean broker per test: a vhost of this worker's own, or the given one, used by one test at a time."""

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
    """Return a lock between all tests of all runs that use this one place."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return filelock.FileLock(Path(tempfile.gettempdir()) / f"orders-test-{name}.lock")


async def remove_topology(url: str) -> None:
    """Remove what the service and our listener declare. RabbitMQ answers the same when there is nothing to remove."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        for queue in QUEUES:
            await channel.queue_delete(queue)
        for exchange in EXCHANGES:
            await channel.exchange_delete(exchange)
    finally:
        await connection.close()

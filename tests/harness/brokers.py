"""A clean broker per test: a vhost of this worker's own, or the given one, used by one test at a time."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiormq
import filelock

from tests.harness.run import Run

QUEUES = ("orders.saga", "orders.saga.dlq")
EXCHANGES = ("orders.events", "orders.dlx")


@contextlib.asynccontextmanager
async def clean(run: Run) -> AsyncIterator[str]:
    """Lend the URL of a vhost without any of the service's queues and exchanges."""
    given = os.environ.get("TEST_RABBITMQ_URL")
    with alone_on(given) if given else contextlib.nullcontext():
        url = given or run.server("rabbitmq") + run.worker.replace("gw", "w")
        await remove_topology(url)
        yield url


def alone_on(url: str) -> filelock.BaseFileLock:
    """Return a lock between all tests of all runs that use this one place."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return filelock.FileLock(Path(tempfile.gettempdir()) / f"orders-test-{name}.lock")


async def remove_topology(url: str) -> None:
    """Remove what the service declares. RabbitMQ answers the same when there is nothing to remove."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        for queue in QUEUES:
            await channel.queue_delete(queue)
        for exchange in EXCHANGES:
            await channel.exchange_delete(exchange)
    finally:
        await connection.close()

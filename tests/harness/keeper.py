"""Run one server for a whole test run: `python -m tests.harness.keeper NAME DIRECTORY`.

It prints one line of JSON when the server is ready (`pid` of the keeper, `url`), and stops it when the run is over.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.harness import containers, databases, servers
from tests.harness.run import OWN, Run, given

VHOSTS = 16  # one per worker, including workers that replace a crashed one


@contextlib.asynccontextmanager
async def postgres(run: Run) -> AsyncIterator[str]:
    """Run a private server; or clean up after the run in the one that TEST_DATABASE_URL names."""
    if url := given("TEST_DATABASE_URL", 5432):
        yield url
        await databases.drop_all(url, run)
        return
    async with servers.postgres(run.directory) as server:
        yield server.url


@contextlib.asynccontextmanager
async def rabbitmq(run: Run) -> AsyncIterator[str]:
    """Run a private server with one vhost per worker (`w0`, `w1`, …); the URL ends before the vhost."""
    async with servers.rabbitmq(run.directory, [f"w{number}" for number in range(VHOSTS)]) as server:
        yield server.url("")


@contextlib.asynccontextmanager
async def redis(run: Run) -> AsyncIterator[str]:
    """Run a private server in which every worker has its own database."""
    async with servers.redis(run.directory) as server:
        yield server.url.rpartition("/")[0] + "/"


SERVERS = {"postgres": postgres, "rabbitmq": rabbitmq, "redis": redis}


async def keep(name: str, directory: Path) -> None:
    """Run the server until the run is over."""
    run = Run(directory)
    # Opening only for reading would block if the controller has ended; then the run is over.
    alive = os.open(directory / "alive", os.O_RDONLY | os.O_NONBLOCK)
    async with SERVERS[name](run) as url:
        print(json.dumps({"pid": os.getpid(), "url": url}), flush=True)  # noqa: T201 - for the parent process
        os.set_blocking(alive, True)
        await asyncio.to_thread(os.read, alive, 1)


def remove(directory: Path, pattern: str) -> None:
    """Remove a server's data: the controller may have been killed, and the data may be in memory."""
    for data in directory.glob(pattern):
        shutil.rmtree(data, ignore_errors=True)  # several keepers may be at it


def main(name: str, directory: Path) -> None:
    """Run the server until the run is over, then clean up."""
    try:
        asyncio.run(keep(name, directory))
    finally:
        remove(directory, f"{name}*/")
    remove(directory, f"{OWN}*/")
    if Run(directory).has_containers:
        containers.remove_all(directory)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

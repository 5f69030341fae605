"""`orders dlq` that dies by SIGKILL at one instant: `python -m tests.harness.crashing_dlq replay|purge POINT`."""

import asyncio
import os
import signal
import sys

from app.bootstrap.workers import dead_letters_of
from app.cli.options import open_pool, operator, servers
from app.operations.dead_letters import Action, Selection


async def treat(action: Action, point: str) -> None:
    """Go over all until the pass comes to the point."""

    def checkpoint(passed: str) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    url, broker_url = servers(None)
    async with open_pool(url) as pool:
        letters = dead_letters_of(pool, broker_url, checkpoint)
        await letters.go_over(action, Selection(), lambda _: None, operator=operator(None))


if __name__ == "__main__":
    asyncio.run(treat(Action(sys.argv[1]), sys.argv[2]))

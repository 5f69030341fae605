"""Run `orders dlq` and SIGKILL it at a crash point: `python -m tests.harness.crashing_dlq replay|purge POINT`."""

import asyncio
import os
import signal
import sys

from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import queues
from app.cli.options import identify_actor, open_pool, servers
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Selection


async def treat(action: DeadLetterAction, point: str) -> None:
    """Scan all dead letters until the scan reaches the crash point."""

    def checkpoint(passed: str) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    url, broker_url = servers(None)
    async with open_pool(url) as pool:
        [queue] = queues()
        broker = make_broker(broker_url, pool, Signals(checkpoint))
        letters = DeadLetters(pool, queue, broker.dead_letters(queue, pool))
        await letters.scan(action, Selection(), lambda _: None, actor=identify_actor(None))


if __name__ == "__main__":
    asyncio.run(treat(DeadLetterAction(sys.argv[1]), sys.argv[2]))

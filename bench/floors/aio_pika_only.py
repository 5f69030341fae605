"""The floor of the relay: aio-pika publishes batches to a quorum queue, persistent, mandatory and confirmed.

There is no database. A client sends a number of batches, and gets the seconds that they took.
"""

import asyncio
import os
import time

import aio_pika
import uvloop

from bench.floors import events

BATCH = 200
CONTENT = b"x" * int(os.environ["MESSAGE_BYTES"])


async def run(batches: int) -> float:
    """Publish so many batches, each when the last one is confirmed. Return the seconds that it took."""
    async with await aio_pika.connect(os.environ["RABBITMQ_URL"]) as broker:
        channel = await broker.channel(on_return_raises=True)
        await events.declare(channel)
        begin = time.perf_counter()
        for _ in range(batches):
            await asyncio.gather(*(events.publish(channel, CONTENT, events.PLACED) for _ in range(BATCH)))
        seconds = time.perf_counter() - begin
        await (await channel.get_queue(events.QUEUE)).purge()
    return seconds


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one line, a number of batches, with the seconds that they took."""
    if line := await reader.readline():
        writer.write(b"%f\n" % await run(int(line)))
    writer.close()


async def main() -> None:
    """Serve until killed."""
    server = await asyncio.start_server(serve, "127.0.0.1", int(os.environ["PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

"""`python -m bench.profile`: draw where the processor time of the service goes, for an accepted and a finished order.

py-spy samples the process under the load of the rows `accept` and `finished`. Each sample belongs to the innermost
frame whose file names a part.
"""

import asyncio
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import asyncpg
import typer
import uvloop

from bench import peers, picture
from bench.client import new_keys, orders, saturate
from bench.lab import Contender, Lab, directory_of_a_run
from bench.measure import WARM_UP_SECONDS
from bench.rows.accept import CLIENTS
from bench.rows.finished import ORDERS, Books, finish, partners

PER_SECOND = "250"  # samples
PARTS = {  # by the innermost frame that matches
    "asyncpg": r"asyncpg/",
    "Redis client": r"redis/|app/cache\.py",
    "RabbitMQ client": r"aiormq/|aio_pika/|pamqp/",
    "HTTP server and framework": r"uvicorn/|starlette/|fastapi/|app/api/server/",
    "request and response": r"app/api/|pydantic/|app/auth/",
    "logs, metrics, spans": r"structlog/|app/observability/|prometheus_client/|opentelemetry/|/facts\.py",
    "idempotency": r"app/idempotency/",
    "orders": r"app/orders/",
    "outbox, relay, consumer": r"app/messaging/",
    "saga": r"app/saga/",
    "partner calls": r"app/partners/",
    "event loop": r"uvloop/|asyncio/",
}
WAITS = re.compile(r"(_pause|wait) \((app/observability/logs|threading)\.py")  # of the thread that writes the log


async def profile(directory: Path, seconds: float) -> dict[str, Counter[str]]:
    """Return the samples of each part, for each row."""
    async with Lab(directory) as lab, partners(lab) as called:
        async with lab.service(["api"]) as service:
            load = partial(saturate, service.port, CLIENTS, orders(new_keys()))
            await load(WARM_UP_SECONDS)
            accepted = await _sample(service, partial(load, seconds), directory / "samples")
        async with lab.service(partners_url=called.url) as service:
            conn = await asyncpg.connect(service.url)
            window = partial(finish, lab, service, Books(conn, ORDERS), called)
            await window(WARM_UP_SECONDS)
            finished = await _sample(service, partial(window, seconds), directory / "samples")
            await conn.close()
    return {"accept": accepted, "finished": finished}


async def _sample(service: Contender, load: Callable[[], Awaitable[object]], found: Path) -> Counter[str]:
    """Run py-spy beside the load, and count its samples by part."""
    python = Path(await peers.python("py_spy"))
    options = ("--pid", str(service.pid), "--format", "raw", "--output", str(found), "--rate", PER_SECOND)
    command = (str(python.with_name("py-spy")), "record", *options, "--duration", "3600")
    spy = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    await load()
    spy.send_signal(signal.SIGINT)
    await spy.wait()
    return count(await asyncio.to_thread(found.read_text))


def count(samples: str) -> Counter[str]:
    """Count the samples of each part; a line is a stack, outermost frame first, and how often it was seen."""
    parts: Counter[str] = Counter()
    for line in samples.splitlines():
        stack, _, times = line.rpartition(" ")
        if not WAITS.search(stack):
            parts[_part(stack.split(";"))] += int(times)
    return parts


def _part(frames: list[str]) -> str:
    for frame in reversed(frames):
        for part, pattern in PARTS.items():
            if re.search(rf"\((?:.*/)?(?:{pattern})", frame):
                return part
    return "other"


def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long each row is sampled.")] = 10.0,
    output: Annotated[Path, typer.Option(help="File for the picture.")] = Path("bench-report/profile.svg"),
) -> None:
    """Draw where the processor time of the service goes. py-spy gets an environment of its own."""
    with directory_of_a_run() as place, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(profile(place, seconds))
    for row, parts in rows.items():
        typer.echo(row)
        for part, samples in parts.most_common():
            typer.echo(f"  {100 * samples / parts.total():5.1f} %  {part}")
    output.parent.mkdir(exist_ok=True)
    output.write_text(picture.of_profile(rows))


if __name__ == "__main__":
    typer.run(main)

"""`orders demo` and `orders sandbox`: the whole system in one command, and the partners' simulator alone."""

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from app import settings
from app.api.server import listener as server_listener
from app.demo import sandbox_process, stack
from app.observability import logs


def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the service.")] = 8000,
    sandbox_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the partner sandbox.")] = 9000,
    playground_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the playground.")] = 8001,
    data_dir: Annotated[Path, typer.Option(help="Directory for the data, kept between runs.")] = Path(".demo"),
    *,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep no data: use a temporary directory, and remove it at the end.")
    ] = False,
) -> None:
    """Run the whole system in one command: PostgreSQL, service, partner sandbox, and a page that breaks them."""
    logs.configure_logging("console", "WARNING", background=True)
    binaries = os.environ.get(settings.PREFIX + "PG_BIN")
    directory = None if ephemeral else data_dir
    uvloop.run(server_listener.until_signalled(stack.run(port, sandbox_port, playground_port, directory, binaries)))


def sandbox(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 9000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ledger: Annotated[Path | None, typer.Option(help="SQLite file, kept between runs; default: in memory.")] = None,
) -> None:
    """Run the partner simulator: inventory, payment and shipping, with a ledger of its own and faults on request."""
    logs.configure_logging("console", "INFO", background=True)
    with contextlib.closing(server_listener.listen(host, port)) as listener:
        address = "sandbox on http://{}:{} (Ctrl-C ends it)".format(*listener.getsockname()[:2])
        server = sandbox_process.make_server(ledger, listener)
        running = server_listener.run(server, started=lambda: typer.echo(address, err=True))
        uvloop.run(server_listener.until_signalled(running))

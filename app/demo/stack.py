"""The whole system in one command: a supervisor with PostgreSQL, the partner sandbox and the service as children."""

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import typer

from app import db, settings
from app.api.server import listener as server_listener
from app.demo import sandbox_process
from app.demo.children import Child, PythonProgram
from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries
from app.demo.playground import app as playground
from app.demo.playground.access import Access
from app.demo.playground.app import Stage
from app.demo.playground.events import Events
from app.errors import ConfigurationError
from app.loops import in_thread

HOST = "127.0.0.1"
SANDBOX_URL_FILE = "sandbox-url"  # in the data directory, for `orders verify --data-dir`
SERVICE_STOP_SECONDS = 10.0  # with those of PostgreSQL, which has no sessions then, within 20 s
# A third of the usual ones: what died is taken over, and a call without an answer repeated, while one watches.
WAITS = {"saga_lease_seconds": 9, "partner_timeout_seconds": 3, "outbox_lease_seconds": 9}

WELCOME = """
  The playground        {playground}
                        Open it in a browser: its buttons break this system, and it shows how all recovers.

  The console           {service}/console
  The orders service    {service}   (API: {service}/docs)
  The partner sandbox   {sandbox}   (its ledger: {sandbox}/ledger)
  PostgreSQL            {database}
  Data                  {data}

Place an order, read it a moment later, and see what happened to it:

  curl -si {service}/orders -H 'Content-Type: application/json' -H 'Idempotency-Key: first-order' \\
    -d '{{"items": [{{"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}}]}}'
  curl -s {service}/orders/<id>
  curl -s {service}/orders/<id>/timeline

Make the next payment fail, then place another order (with another key): it ends rejected, with every step undone:

  curl -s -X PUT {sandbox}/faults -H 'Content-Type: application/json' \\
    -d '[{{"target": "payment.charge", "kind": "refuse", "times": 1}}]'

Press Ctrl-C to stop.
"""


async def run(port: int, sandbox_port: int, playground_port: int, data_dir: Path | None, pg_bin: str | None) -> None:
    """Run until a signal arrives. `data_dir` None: use a temporary directory.

    Raises ConfigurationError, also while it runs: if a child refuses to start again.
    """
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(_open_directory(data_dir))
        service_socket, sandbox_socket, playground_socket = (
            stack.enter_context(contextlib.closing(server_listener.listen(HOST, number)))
            for number in (port, sandbox_port, playground_port)
        )
        service_url, sandbox_url = (
            "http://{}:{}".format(*listener.getsockname()) for listener in (service_socket, sandbox_socket)
        )
        console_key = secrets.token_hex()  # sessions outlive a restart of the service
        access = Access(playground_socket.getsockname()[1])
        events = Events()
        typer.echo("Starting PostgreSQL …", err=True)
        postgres = EmbeddedPostgres(directory, find_binaries(pg_bin))
        partners = PythonProgram(
            "app.demo.sandbox_process",
            sandbox_socket,
            lambda: {"ledger": str(directory / "ledger.sqlite")},
            sandbox_process.SHUTDOWN_SECONDS * 2,
        )
        orders = PythonProgram(
            "app.demo.service_process",
            service_socket,
            lambda: {
                "settings": {**connections(postgres.url, sandbox_url), **_shorten_waits()},
                "console": {"open_key": console_key, "playground_url": access.url},
            },
            SERVICE_STOP_SECONDS,
        )

        def report(text: str) -> None:
            typer.echo(text, err=True)
            events.add(text.splitlines()[0])  # more lines are the end of a log

        children = database, sandbox, service = (
            Child("PostgreSQL", postgres, report),
            Child("the sandbox", partners, report),
            Child("the service", orders, report),
        )
        for child in children:
            stack.push_async_callback(child.stop)
        for program in (partners, orders):  # they import their code while PostgreSQL starts
            await program.spawn()
        await database.start()
        await in_thread(db.migrate, postgres.url)
        (directory / SANDBOX_URL_FILE).write_text(sandbox_url)
        await sandbox.start()
        await service.start()
        verification = settings.load(
            settings.Verification, **{**connections(postgres.url, sandbox_url), **_shorten_waits()}
        )
        stage = Stage(database, sandbox, service, service_url, sandbox_url, verification)
        welcome = WELCOME.format(
            playground=access.url,
            service=service_url,
            sandbox=sandbox_url,
            database=postgres.url,
            data=data_dir or "in a temporary directory",
        )
        await server_listener.run(
            playground.make_server(playground_socket, stage, access, events),
            started=partial(typer.echo, welcome),
            unless=_until_refused(children),
        )


async def _until_refused(children: Iterable[Child]) -> None:
    await asyncio.gather(*(child.until_refused() for child in children))


def connections(database_url: str, sandbox_url: str) -> Mapping[str, str]:
    """Return the settings of what works with the demo's servers: its service, and `orders verify --data-dir`."""
    return {
        "database_url": database_url,
        "rabbitmq_url": "",
        "redis_url": "",
        "inventory_url": sandbox_url,
        "payment_provider": "http",
        "payment_url": sandbox_url,
        "shipping_url": sandbox_url,
    }


def _shorten_waits() -> Mapping[str, float]:
    """Return the service's waits: those of WAITS, unless the environment has one of them, which must fit the others."""
    chosen = any(os.environ.get(settings.PREFIX + name.upper()) for name in WAITS)
    return {"shutdown_timeout_seconds": SERVICE_STOP_SECONDS - 2, **({} if chosen else WAITS)}


@contextlib.contextmanager
def _open_directory(data_dir: Path | None) -> Iterator[Path]:
    # Other users may enter, but not list it: started by root, PostgreSQL runs as another user in its own subdirectory.
    if data_dir is not None:
        try:
            data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot keep data in {data_dir}: {error.strerror}") from error
        yield data_dir.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="orders-demo-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)

"""The whole system in one command: PostgreSQL, the partner sandbox and the service, started and stopped together.

Sandbox and service share this process and its event loop; PostgreSQL is a separate process.
"""

import contextlib
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer

import sandbox
from app import bootstrap, db, main, settings
from app.api.server import listener as server_listener
from app.bootstrap.tracing import make_tracing
from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries
from app.errors import ConfigurationError
from app.loops import in_thread
from app.observability import logs
from app.telemetry_settings import load_telemetry

HOST = "127.0.0.1"
SANDBOX_URL_FILE = "sandbox-url"  # in the data directory, for `orders verify --data-dir`
SANDBOX_SHUTDOWN_SECONDS = 2.0  # the ledger already has every answered call

WELCOME = """
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


async def run(port: int, sandbox_port: int, data_dir: Path | None, pg_bin: str | None) -> None:
    """Run until a signal arrives. `data_dir` None: use a temporary directory."""
    telemetry = load_telemetry()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_open_directory(data_dir))
        logs.configure_logging("console", "WARNING", background=True)
        service_socket = stack.enter_context(contextlib.closing(server_listener.listen(HOST, port)))
        sandbox_socket = stack.enter_context(contextlib.closing(server_listener.listen(HOST, sandbox_port)))
        service_url, sandbox_url = (
            "http://{}:{}".format(*listener.getsockname()) for listener in (service_socket, sandbox_socket)
        )
        typer.echo("Starting PostgreSQL …", err=True)
        async with EmbeddedPostgres(directory, find_binaries(pg_bin)) as postgres:
            await in_thread(db.migrate, postgres.url)
            configured = settings.load(
                settings.Settings,
                database_url=postgres.url,
                rabbitmq_url="",
                redis_url="",
                inventory_url=sandbox_url,
                payment_provider="http",
                payment_url=sandbox_url,
                shipping_url=sandbox_url,
                roles=settings.ALL_ROLES,
            )
            (directory / SANDBOX_URL_FILE).write_text(sandbox_url)
            partners = simulator(directory / "ledger.sqlite", sandbox_socket)
            lease = bootstrap.transport_lease(configured)
            await main.take_lease(configured, lease)
            service = main.make_server(configured, service_socket, lease=lease, tracing=make_tracing(telemetry))
            text = WELCOME.format(
                service=service_url,
                sandbox=sandbox_url,
                database=postgres.url,
                data=data_dir or "in a temporary directory",
            )
            await server_listener.run(partners, service, started=lambda: typer.echo(text), unless=lease.until_refused())


def simulator(ledger: Path | None, listener: socket.socket) -> server_listener.Server:
    """Make a server for the sandbox. Raises ConfigurationError when the ledger file cannot be used."""
    try:
        sandbox.Ledger(ledger).close()
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"cannot keep a ledger in {ledger}: {error}") from error
    return server_listener.Server(
        sandbox.create_app(ledger), listener, SANDBOX_SHUTDOWN_SECONDS, http=sandbox.http_protocol
    )


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

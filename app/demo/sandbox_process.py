"""The partner sandbox: a server for it, and `python -m app.demo.sandbox_process`, the demo's child process."""

import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import sandbox
from app.api.server import listener as server_listener
from app.demo.children import Values, run_child
from app.errors import ConfigurationError

SHUTDOWN_SECONDS = 2.0  # the ledger already has every answered call


def make_server(ledger: Path | None, listener: socket.socket) -> server_listener.Server:
    """Make a server for the sandbox. Raises ConfigurationError when the ledger file cannot be used."""
    try:
        sandbox.Ledger(ledger).close()
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"cannot keep a ledger in {ledger}: {error}") from error
    return server_listener.Server(sandbox.create_app(ledger), listener, SHUTDOWN_SECONDS, http=sandbox.http_protocol)


async def serve(listener: socket.socket, values: Values, ready: Callable[[], None]) -> None:
    """Serve the ledger file `values["ledger"]` until cancelled. Raises ConfigurationError."""
    await server_listener.run(make_server(Path(values["ledger"]), listener), started=ready)


if __name__ == "__main__":
    run_child(serve)

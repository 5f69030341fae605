"""`python -m app.demo.service_process`: the demo's service, as a child process of its supervisor."""

import socket
from collections.abc import Callable

from app import main, settings
from app.bootstrap.tracing import make_tracing
from app.console.deps import ConsoleConfig
from app.demo.children import Values, run_child
from app.observability import logs
from app.telemetry_settings import load_telemetry


async def serve(listener: socket.socket, values: Values, ready: Callable[[], None]) -> None:
    """Serve with these settings until cancelled. Raises ConfigurationError.

    `values`: the `settings`, and the `console`.
    """
    logs.configure_logging("console", "WARNING", background=True)
    configured = settings.load(settings.Settings, **values["settings"], roles=settings.ALL_ROLES)
    console = ConsoleConfig(**values["console"])
    await main.serve_on(listener, configured, ready, tracing=make_tracing(load_telemetry()), console=console)


if __name__ == "__main__":
    run_child(serve)

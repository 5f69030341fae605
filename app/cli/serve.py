"""`orders serve`: the service."""

import uvloop

from app import main, settings
from app.api.server import listener as server_listener
from app.bootstrap.tracing import make_tracing
from app.observability import logs
from app.telemetry_settings import load_telemetry


def serve() -> None:
    """Run the service with the roles in ORDERS_ROLES, until Ctrl-C or SIGTERM."""
    configured, telemetry = settings.load(settings.Settings), load_telemetry()
    logs.configure_logging(configured.log_format, configured.log_level, background=True)
    tracing = make_tracing(telemetry, obeys_callers=configured.trace_caller_sampling)
    uvloop.run(server_listener.until_signalled(main.serve(configured, tracing=tracing)))

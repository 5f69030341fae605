"""`orders serve`: the service."""

import uvloop

from app import main, settings
from app.api.server import listener as server_listener
from app.observability import logs


def serve() -> None:
    """Run the service with the roles in ORDERS_ROLES, until Ctrl-C or SIGTERM."""
    configured = settings.load(settings.Settings)
    logs.configure_logging(configured.log_format, configured.log_level, background=True)
    uvloop.run(server_listener.until_signalled(main.serve(configured)))

"""Reserve ports for servers. A run reserves each port once, because its server may not be bound to it all the time."""

import contextlib
import os
from pathlib import Path

from app.demo import embedded_postgres

VARIABLE = "ORDERS_TEST_RUN"  # holds the run's directory, for the workers


def free_port() -> int:
    """Return an unused port of 127.0.0.1, and reserve it in the run."""
    reserved = Path(os.environ[VARIABLE], "ports")
    reserved.mkdir(exist_ok=True)
    while True:
        port = embedded_postgres.free_port()
        with contextlib.suppress(FileExistsError):
            (reserved / str(port)).touch(exist_ok=False)
            return port

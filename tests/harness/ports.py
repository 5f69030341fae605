"""Ports for servers to come. A run gives none out twice: its server may not have bound it yet, or be down."""

import contextlib
import os
from pathlib import Path

from app.demo import embedded_postgres

VARIABLE = "ORDERS_TEST_RUN"  # workers learn the run's directory from it


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses, and that nobody else in the run is given."""
    given_out = Path(os.environ[VARIABLE], "ports")
    given_out.mkdir(exist_ok=True)
    while True:
        port = embedded_postgres.free_port()
        with contextlib.suppress(FileExistsError):
            (given_out / str(port)).touch(exist_ok=False)
            return port

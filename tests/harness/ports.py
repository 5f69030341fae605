"""Ports for servers, each lent to one test alone: it is lent before its server listens, and while that is down."""

import itertools
import os
import random
import socket
from collections.abc import Iterator

SHARES = 16  # one for each worker, and for those that replace a crashed one


def _share() -> Iterator[int]:
    """Go round in this worker's ports, from any on; the kernel lends none of them to outgoing connections."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20_000 + worker % SHARES, 32_000, SHARES)
    return itertools.cycle(random.sample(ports, len(ports)))


_ports = _share()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses, and that nobody else is lent for a long time."""
    return next(port for port in _ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

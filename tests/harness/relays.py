"""Make a relay with default settings, any of which a test may change."""

from collections.abc import Callable

from app import db
from app.loops import Backoff
from app.messaging.consumer import Consumer
from app.messaging.local import LocalTransport
from app.messaging.relay import Relay, RelayConfig, Transport
from tests.harness.events import nothing
from tests.harness.observed import Observed


def make_relay(
    pool: db.Pool,
    transport: Transport,
    signals: Observed | None = None,
    *,
    batch_size: int = 100,
    lease_seconds: float = 60,
    backoff_seconds: float = 1,
    max_attempts: int = 3,
    checkpoint: Callable[[str], None] = nothing,
) -> Relay:
    """Make a relay. By full jitter, its pauses have any length up to `backoff_seconds`."""
    config = RelayConfig(batch_size, lease_seconds, Backoff(backoff_seconds, backoff_seconds), max_attempts)
    seam = signals or Observed()
    seam.crash_point = checkpoint
    return Relay(pool, transport, config, seam)


def local_transport(*consumers: Consumer) -> LocalTransport:
    """Return the in-process transport of these consumers."""
    transport = LocalTransport()
    transport.consumers.extend(consumers)
    return transport

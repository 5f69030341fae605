"""A relay with a setting or two of its own."""

from collections.abc import Callable

from app import db
from app.messaging.relay import Relay, Transport
from app.observability.metrics import Metrics
from tests.harness.events import nothing


def make_relay(
    pool: db.Pool,
    transport: Transport,
    metrics: Metrics | None = None,
    *,
    batch_size: int = 100,
    lease_seconds: float = 60,
    backoff_seconds: float = 1,
    max_attempts: int = 3,
    checkpoint: Callable[[str], None] = nothing,
) -> Relay:
    """Make a relay. Full jitter makes its pauses of any length up to `backoff_seconds`."""
    return Relay(
        pool,
        transport,
        metrics or Metrics(),
        batch_size=batch_size,
        lease_seconds=lease_seconds,
        backoff_base_seconds=backoff_seconds,
        backoff_cap_seconds=backoff_seconds,
        max_attempts=max_attempts,
        checkpoint=checkpoint,
    )

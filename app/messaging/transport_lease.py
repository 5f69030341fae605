"""The transport lease: all relays and consumers of one database use the same transport.

A relay with the in-process transport beside others with RabbitMQ marks events as published that no broker ever gets. So
each process with one of these roles keeps a row that names its transport, and renews it. While a row of another
transport is alive, none is given, and the process ends.

- Two processes start at once: they take turns at the table's lock, and the second one finds the first one's row.
- A process stops: it deletes its row at the end, so "stop all, change the setting, start" works at once.
- A process is killed: its row counts until its lease ends. One with the same transport starts at once.
- A process freezes, or Postgres is down for longer than the lease: it publishes nothing until it has renewed. It knows
  by its own clock, which it reads before it asks, so its lease never ends later there than in Postgres.
- Postgres is down when a process starts: it publishes and consumes nothing until it has the lease.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from uuid import uuid4

import structlog
from sqlalchemy import Column, DateTime, Table, Text, Uuid

from app import db
from app.errors import ConfigurationError, DatabaseUnavailable, TransportNotLeased
from app.messaging.envelope import Envelope
from app.messaging.relay import PublishResult, Transport

log = structlog.get_logger(__name__)

RABBITMQ, IN_PROCESS = "rabbitmq", "in-process"
LEASE_SECONDS = 30.0
RENEW_PERIOD_SECONDS = 5.0
RELEASE_SECONDS = 1.0  # the process is ending; the lease ends by itself

table = Table(
    "transport_leases",
    db.metadata,
    Column("id", Uuid, primary_key=True),
    Column("transport", Text, nullable=False),
    Column("holder", Text, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)


class TransportLease:
    """One process's lease. `holder` says where the process runs, for the error of another one."""

    def __init__(self, transport: str, holder: str, seconds: float = LEASE_SECONDS) -> None:
        self.transport = transport
        self._holder = holder
        self._seconds = seconds
        self._id = uuid4()
        self._held_until = -math.inf  # by our monotonic clock
        self._refusal: ConfigurationError | None = None
        self._refused = asyncio.Event()

    def seconds_left(self) -> float:
        """Return for how long the lease is still held; 0 or less: it is not."""
        return self._held_until - time.monotonic()

    def require(self) -> None:
        """Raise TransportNotLeased unless the lease is held. Costs no statement."""
        if self.seconds_left() <= 0:
            text = f"the lease of the transport {self.transport} is not held"
            raise TransportNotLeased(text, text)

    async def take(self, url: str) -> None:
        """Take the lease at the start of a process, over a connection for this alone. Raises as `renew` does."""
        async with db.open_pool(url, 1) as pool:
            await self.renew(pool)

    async def renew(self, pool: db.Pool) -> int:
        """Take the lease or renew it. Returns 0: there is nothing more to do before the next period.

        Raises ConfigurationError when another transport is in use, and then every time: a process that waited for its
        chance would take over when the others restart. Raises DatabaseUnavailable.
        """
        if self._refusal is not None:
            raise self._refusal
        asked_at = time.monotonic()
        async with db.transaction(pool) as conn:
            other = await self._take(conn)
        if other is not None:
            self._refuse(*other)
        self._held_until = asked_at + self._seconds
        return 0

    async def release(self, pool: db.Pool) -> None:
        """Give the lease back. For the end of a process: nothing is published after it."""
        self._held_until = -math.inf
        try:
            async with asyncio.timeout(RELEASE_SECONDS), db.connection(pool) as conn:
                await conn.execute("DELETE FROM transport_leases WHERE id = $1", self._id)
        except (DatabaseUnavailable, TimeoutError) as error:
            log.warning("transport.not_released", error=str(error), until="the lease ends")

    async def until_refused(self) -> None:
        """Wait until another transport turns out to be in use, then raise ConfigurationError."""
        await self._refused.wait()
        if self._refusal is not None:
            raise self._refusal

    async def _take(self, conn: db.Connection) -> tuple[str, str] | None:
        """Write the row of this process, unless another transport is in use: return it, with one who uses it."""
        # It conflicts with itself and with no reader: of two that start at once, the second sees what the first wrote.
        await conn.execute("LOCK TABLE transport_leases IN SHARE ROW EXCLUSIVE MODE")
        await conn.execute("DELETE FROM transport_leases WHERE expires_at <= clock_timestamp()")
        query = "SELECT transport, holder FROM transport_leases WHERE transport <> $1"
        if (other := await conn.fetchrow(query, self.transport)) is not None:
            return other["transport"], other["holder"]
        await conn.execute(
            """
            INSERT INTO transport_leases (id, transport, holder, expires_at)
            VALUES ($1, $2, $3, clock_timestamp() + make_interval(secs => $4))
            ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at
            """,
            self._id,
            self.transport,
            self._holder,
            self._seconds,
        )
        return None

    def _refuse(self, transport: str, holder: str) -> None:
        self._held_until = -math.inf
        self._refusal = ConfigurationError(
            f"ORDERS_RABBITMQ_URL: the transport here is {self.transport}, but {holder} runs with {transport}; set it "
            f"alike, or stop every relay and consumer first (one that was killed counts for {self._seconds:g} s)"
        )
        self._refused.set()
        raise self._refusal


class LeasedTransport:
    """A transport that publishes only while the lease is held."""

    def __init__(self, transport: Transport, lease: TransportLease) -> None:
        self._transport = transport
        self._lease = lease

    async def ready(self) -> None:
        """Connect, unless connected. Raises TransportNotLeased, and what the transport raises."""
        self._lease.require()
        await self._transport.ready()

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float, results: list[PublishResult]
    ) -> Sequence[PublishResult]:
        """Publish for up to `seconds`, and not beyond the lease."""
        self._lease.require()
        return await self._transport.publish(envelopes, min(seconds, self._lease.seconds_left()), results)

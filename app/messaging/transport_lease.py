"""The transport lease: all relays and consumers of one database use the same transport.

If one relay used the in-process transport and others RabbitMQ, the first would mark events as published that the broker
never gets. So each process with one of these roles keeps a row that names its transport, and renews it. While a row of
another transport is alive, a process gets no lease and ends.

- Two processes start at once: the table's lock lets one go first, and the second finds the first one's row.
- A process stops: it deletes its row at the end, so "stop all, change the setting, start" works at once.
- A process is killed: its row counts until its lease ends. A process with the same transport can start at once.
- A process freezes, or Postgres is down for longer than the lease: it publishes nothing until it has renewed. It reads
  its own clock before each renewal, so it never believes in its lease for longer than Postgres does.
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

LEASE_SECONDS = 30.0
RENEW_PERIOD_SECONDS = 5.0
RELEASE_SECONDS = 1.0  # the process is ending; without a release, the lease expires

table = Table(
    "transport_leases",
    db.metadata,
    Column("id", Uuid, primary_key=True),
    Column("transport", Text, nullable=False),
    Column("holder", Text, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)


class TransportLease:
    """The lease of one process. `holder`: where the process runs, for the error message of another process."""

    def __init__(self, transport: str, holder: str, seconds: float = LEASE_SECONDS) -> None:
        self.transport = transport
        self._holder = holder
        self._seconds = seconds
        self._id = uuid4()
        self._held_until = -math.inf  # by our monotonic clock
        self._refusal: ConfigurationError | None = None
        self._refused = asyncio.Event()

    def seconds_left(self) -> float:
        """Return for how many seconds the lease is still held; 0 or less: it is not held."""
        return self._held_until - time.monotonic()

    def require(self) -> None:
        """Raise TransportNotLeased unless the lease is held. Sends nothing to Postgres."""
        if self.seconds_left() <= 0:
            text = f"the lease of the transport {self.transport} is not held"
            raise TransportNotLeased(text, text)

    async def take(self, url: str) -> None:
        """Take the lease at the start of a process, over a connection of its own. Raises what `renew` raises."""
        async with db.open_pool(url, 1) as pool:
            await self.renew(pool)

    async def renew(self, pool: db.Pool) -> int:
        """Take the lease or renew it. Returns 0: there is nothing more to do before the next period.

        Raises DatabaseUnavailable; ConfigurationError when another transport is in use, and in every later call too:
        otherwise a process with the wrong setting could take over while the others restart.
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
        """Release the lease at the end of the process. Nothing is published afterwards."""
        self._held_until = -math.inf
        try:
            async with asyncio.timeout(RELEASE_SECONDS), db.connection(pool) as conn:
                await conn.execute("DELETE FROM transport_leases WHERE id = $1", self._id)
        except (DatabaseUnavailable, TimeoutError) as error:
            log.warning("transport.not_released", error=str(error), until="the lease ends")

    async def until_refused(self) -> None:
        """Wait until another transport is found in use, then raise ConfigurationError."""
        await self._refused.wait()
        if self._refusal is not None:
            raise self._refusal

    async def _take(self, conn: db.Connection) -> tuple[str, str] | None:
        """Write the row of this process. If another transport is in use, return it and one of its holders instead."""
        # This lock conflicts with itself but not with readers. If two processes start at once, the second waits for it
        # and sees the first one's row.
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


async def list_live(conn: db.Connection) -> set[str]:
    """Return the names of the transports that live processes use."""
    rows = await conn.fetch("SELECT DISTINCT transport FROM transport_leases WHERE expires_at > clock_timestamp()")
    return {row["transport"] for row in rows}


class LeasedTransport:
    """A transport that publishes only while the lease is held."""

    def __init__(self, transport: Transport, lease: TransportLease) -> None:
        self._transport = transport
        self._lease = lease

    async def ready(self) -> None:
        """Connect if necessary. Raises TransportNotLeased, and what the transport raises."""
        self._lease.require()
        await self._transport.ready()

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float, results: list[PublishResult]
    ) -> Sequence[PublishResult]:
        """Publish for up to `seconds`, but not beyond the end of the lease."""
        self._lease.require()
        return await self._transport.publish(envelopes, min(seconds, self._lease.seconds_left()), results)

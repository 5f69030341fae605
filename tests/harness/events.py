"""Make events as the service does, and a handler whose effects can be counted."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from app import db
from app.messaging import outbox
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from tests.harness.observed import Observed
from tests.harness.wait import AMPLE_SECONDS, wait_until

PLACED = "orders.order.placed.v1"
CONFIRMED = "orders.order.confirmed.v1"


def event(subject: str | None = None, sequence: int = 1, event_type: str = PLACED, **attributes: Any) -> Envelope:
    """Make an event of the order `subject`, by default of a new one."""
    return Envelope(
        id=uuid4(),
        type=event_type,
        subject=subject or str(uuid4()),
        sequence=sequence,
        tenant="default",
        time=datetime.now(UTC),
        **{"data": {"total": "29.97"}, **attributes},
    )


async def put(pool: db.Pool, *events: Envelope) -> None:
    """Write events to the outbox, committed."""
    async with db.transaction(pool) as conn:
        for envelope in events:
            await outbox.add(conn, [envelope])


async def put_old_event(pool: db.Pool) -> None:
    """Write an event that has waited for an hour, and is due in an hour."""
    async with db.transaction(pool) as conn:
        await outbox.add(conn, [event()])
        await conn.execute(
            "UPDATE outbox SET pending_since = pending_since - interval '1 hour', "
            "next_attempt_at = clock_timestamp() + interval '1 hour'"
        )


async def make_due(pool: db.Pool) -> None:
    """Make every waiting event due now."""
    await pool.execute("UPDATE outbox SET next_attempt_at = clock_timestamp()")


async def make_garbage(pool: db.Pool) -> None:
    """Write an event, and leave a dead version of its row. Postgres counts it when the session ends."""
    await put(pool, event())
    async with pool.acquire() as conn:
        await conn.execute("UPDATE outbox SET last_error = 'dead'")
        await conn.close()


def nothing(_: str = "") -> None:
    """Do nothing, as a callback that a test does not need."""


def counted(signals: Observed, name: str) -> float | None:
    """Read one metric without labels."""
    return signals.value(name)


class Effects:
    """A handler that writes a row per effect, then fails while `failure` is set."""

    def __init__(self, pool: db.Pool) -> None:
        self.failure: Exception | None = None
        self.calls = 0
        self._pool = pool

    @classmethod
    async def on(cls, pool: db.Pool) -> "Effects":
        """Create the table of the rows."""
        async with db.transaction(pool) as conn:
            await conn.execute("CREATE TABLE effects (message_id uuid NOT NULL)")
        return cls(pool)

    async def __call__(self, conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        self.calls += 1
        await conn.executemany("INSERT INTO effects VALUES ($1)", [(envelope.id,) for envelope in envelopes])
        if self.failure is not None:
            raise self.failure

    async def committed(self) -> list[UUID]:
        """Return the id of each message as often as it took effect."""
        return [row["message_id"] for row in await self._pool.fetch("SELECT message_id FROM effects")]

    async def arrive(self, number: int) -> None:
        """Wait until `number` effects are committed."""

        async def arrived() -> bool:
            return len(await self.committed()) >= number

        await wait_until(arrived, AMPLE_SECONDS, f"{number} effects")

    def consumer(self, signals: Observed | None = None, *, max_attempts: int = 3) -> Consumer:
        """Make a consumer of PLACED events with this handler."""
        return Consumer(self._pool, "effects", {PLACED: self}, max_attempts, signals or Observed())

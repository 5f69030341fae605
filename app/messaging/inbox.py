"""The inbox table: which message took effect, and how often one failed. One row per (consumer, message)."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Column, DateTime, Integer, Table, Text, text

from app.db import Connection, metadata

table = Table(
    "inbox",
    metadata,
    Column("consumer", Text, primary_key=True),
    Column("message_id", Text, primary_key=True),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("first_failure_at", DateTime(timezone=True)),
    Column("last_failure_at", DateTime(timezone=True)),
    Column("last_error", Text),
    Column("processed_at", DateTime(timezone=True)),
    Column("dead_at", DateTime(timezone=True)),
)


@dataclass(frozen=True, slots=True)
class Failures:
    """How often a message failed, and when it first and last did."""

    attempts: int
    first_at: datetime
    last_at: datetime


async def first_time(conn: Connection, consumer: str, message_id: str) -> bool:
    """Claim the message's effect for the caller's transaction; False when it already took effect.

    Two transactions with the same message meet at the primary key: the second waits for the first and then sees it.
    """
    return (
        await conn.fetchval(
            """
            INSERT INTO inbox (consumer, message_id, processed_at) VALUES ($1, $2, clock_timestamp())
            ON CONFLICT (consumer, message_id) DO UPDATE SET processed_at = excluded.processed_at
            WHERE inbox.processed_at IS NULL
            RETURNING true
            """,
            consumer,
            message_id,
        )
        is True
    )


async def failed(conn: Connection, consumer: str, message_id: str, error: str) -> Failures:
    """Count a failure in a transaction of its own, so that the failed one's rollback cannot lose the count."""
    row = await conn.fetchrow(
        """
        INSERT INTO inbox AS i (consumer, message_id, attempts, first_failure_at, last_failure_at, last_error)
        VALUES ($1, $2, 1, clock_timestamp(), clock_timestamp(), left($3, 500))
        ON CONFLICT (consumer, message_id) DO UPDATE
        SET attempts = i.attempts + 1, last_error = excluded.last_error, last_failure_at = excluded.last_failure_at,
            first_failure_at = coalesce(i.first_failure_at, excluded.first_failure_at)
        RETURNING attempts, first_failure_at, last_failure_at
        """,
        consumer,
        message_id,
        error,
    )
    assert row is not None  # noqa: S101 - bug: an upsert always returns its row
    return Failures(row["attempts"], row["first_failure_at"], row["last_failure_at"])


async def dead(conn: Connection, consumer: str, message_id: str) -> None:
    """Record that the message was dead-lettered."""
    await conn.execute(
        "UPDATE inbox SET dead_at = clock_timestamp() WHERE consumer = $1 AND message_id = $2",
        consumer,
        message_id,
    )

"""The inbox table: which messages took effect, and how often each failed. One row per (consumer, message)."""

from collections.abc import Collection
from dataclasses import fields
from datetime import datetime
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Integer, Table, Text, text

from app.db import Connection, affected, metadata
from app.values import immutable

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
    Column("purged_at", DateTime(timezone=True)),  # an operator removed its dead letter; only with `dead_at`
    Index(
        "inbox_dead_at_idx",
        "consumer",
        "dead_at",
        postgresql_where=text("dead_at IS NOT NULL AND processed_at IS NULL"),
    ),
)


@immutable
class Failures:
    """How often a message failed, and when it first and last failed."""

    attempts: int
    first_at: datetime
    last_at: datetime


async def first_time(conn: Connection, consumer: str, message_ids: Collection[str]) -> set[str]:
    """Mark messages as processed in the caller's transaction. Return those that had not taken effect yet.

    Two transactions with the same message conflict at the primary key: the second waits for the first to end. The rows
    are written in the order of their ids, so two batches cannot wait for each other.
    """
    rows = await conn.fetch(
        """
        INSERT INTO inbox (consumer, message_id, processed_at)
        SELECT $1, message_id, clock_timestamp() FROM unnest($2::text[]) AS message_id
        ON CONFLICT (consumer, message_id) DO UPDATE SET processed_at = excluded.processed_at
        WHERE inbox.processed_at IS NULL
        RETURNING message_id
        """,
        consumer,
        sorted(message_ids),
    )
    return {row["message_id"] for row in rows}


async def count_failure(conn: Connection, consumer: str, message_id: str, error: str) -> Failures:
    """Count a failure. Use a new transaction: the failed one is rolled back, and the count with it."""
    row = await conn.fetchrow(
        """
        INSERT INTO inbox AS i (consumer, message_id, attempts, first_failure_at, last_failure_at, last_error)
        VALUES ($1, $2, 1, statement_timestamp(), statement_timestamp(), left($3, 500))
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


async def mark_dead(conn: Connection, consumer: str, message_id: str) -> None:
    """Record that the message is dead, and clear the record of an earlier purge."""
    await conn.execute(
        "UPDATE inbox SET dead_at = clock_timestamp(), purged_at = NULL WHERE consumer = $1 AND message_id = $2",
        consumer,
        message_id,
    )


async def mark_purged(conn: Connection, consumer: str, message_ids: Collection[str]) -> None:
    """Record that an operator purges the dead letters of these messages. Skip messages that took effect.

    A message that the broker itself dead-lettered may have no row yet; insert one.
    """
    await conn.execute(
        """
        INSERT INTO inbox AS i (consumer, message_id, dead_at, purged_at)
        SELECT $1, message_id, clock_timestamp(), clock_timestamp() FROM unnest($2::text[]) AS message_id
        ON CONFLICT (consumer, message_id) DO UPDATE
        SET dead_at = coalesce(i.dead_at, excluded.dead_at), purged_at = excluded.purged_at
        WHERE i.processed_at IS NULL
        """,
        consumer,
        sorted(set(message_ids)),
    )


async def dead_letters(conn: Connection, consumer: str, ids: Collection[UUID]) -> set[UUID]:
    """Return which of these messages are dead, purged ones included."""
    rows = await conn.fetch(
        "SELECT message_id FROM inbox WHERE consumer = $1 AND message_id = ANY($2) AND dead_at IS NOT NULL",
        consumer,
        [str(message_id) for message_id in ids],
    )
    return {UUID(row["message_id"]) for row in rows}


async def prune(
    conn: Connection, after: UUID, before: UUID, limit: int, retention_seconds: float, consumer: str
) -> tuple[int, UUID | None]:
    """Scan the next `limit` rows between these ids, oldest first, and delete those past their retention.

    Rows of failed and dead messages stay, because their counts are still needed. Returns how many rows were deleted,
    and the id to continue after; None: there are no more rows.
    """
    rows = await conn.fetch(
        f"""
        SELECT message_id FROM inbox WHERE consumer = $1 AND message_id > $2 AND message_id < $3
        ORDER BY message_id LIMIT {limit:d}
        """,  # noqa: S608 - a number
        consumer,
        str(after),
        str(before),
    )
    if not rows:
        return 0, None
    last = rows[-1]["message_id"]
    deleted = await conn.execute(
        """
        DELETE FROM inbox WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM inbox
            WHERE consumer = $1 AND message_id > $2 AND message_id <= $3
              AND processed_at <= clock_timestamp() - make_interval(secs => $4)
            FOR UPDATE SKIP LOCKED
        ))
        """,
        consumer,
        str(after),
        last,
        retention_seconds,
    )
    return affected(deleted), UUID(last) if len(rows) == limit else None


@immutable
class DeadCount:
    """How many messages are recorded as dead, and when the newest of them died; None: there is none."""

    number: int
    newest_at: datetime | None


async def count_dead(conn: Connection, consumer: str, at_most: int) -> DeadCount:
    """Count the messages that are recorded as dead, without purged ones, among the `at_most` that died last."""
    row = await conn.fetchrow(
        f"""
        SELECT count(*) AS number, max(dead_at) AS newest_at FROM (
            SELECT dead_at, purged_at FROM inbox
            WHERE consumer = $1 AND dead_at IS NOT NULL AND processed_at IS NULL
            ORDER BY dead_at DESC LIMIT {at_most:d}
        ) AS dead WHERE purged_at IS NULL
        """,  # noqa: S608 - a number
        consumer,
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return DeadCount(**row)


@immutable
class InboxRecord:
    """What the inbox knows about a message that was delivered at least once."""

    attempts: int
    first_failure_at: datetime | None
    last_error: str | None
    processed_at: datetime | None
    purged_at: datetime | None


async def look_up(conn: Connection, consumer: str, message_ids: Collection[str]) -> dict[str, InboxRecord]:
    """Return the inbox rows of these messages, without those that were never delivered."""
    rows = await conn.fetch(
        """
        SELECT message_id, attempts, first_failure_at, last_error, processed_at, purged_at
        FROM inbox WHERE consumer = $1 AND message_id = ANY($2::text[])
        """,
        consumer,
        list(message_ids),
    )
    return {
        row["message_id"]: InboxRecord(**{field.name: row[field.name] for field in fields(InboxRecord)}) for row in rows
    }


async def reset_attempts(conn: Connection, consumer: str, message_ids: Collection[str]) -> None:
    """Reset the attempts of these messages. Skip messages that took effect."""
    await conn.execute(
        """
        UPDATE inbox SET attempts = 0, dead_at = NULL, purged_at = NULL
        WHERE consumer = $1 AND message_id = ANY($2::text[]) AND processed_at IS NULL
        """,
        consumer,
        list(message_ids),
    )

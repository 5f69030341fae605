"""The outbox table: what must reach the broker, written in the transaction that made it true.

A row is pending until it is published (a broker confirmed it) or parked (refused too often; an operator decides).
`next_attempt_at` is when it may be claimed; claiming moves it to the end of the lease and leaves a token, so a relay
that dies loses nothing but time, and one that wakes up late can change nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Integer, Table, Text, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB

from app.db import Connection, metadata
from app.messaging.envelope import Envelope

PENDING = "published_at IS NULL AND parked_at IS NULL"

table = Table(
    "outbox",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("type", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    Column("traceparent", Text),
    Column("tracestate", Text),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("next_attempt_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("claim_token", Uuid),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("last_error", Text),
    Column("published_at", DateTime(timezone=True)),
    Column("parked_at", DateTime(timezone=True)),
    Index("outbox_next_attempt_at_idx", "next_attempt_at", "id", postgresql_where=text(PENDING)),
    Index("outbox_subject_sequence_idx", "subject", "sequence", postgresql_where=text("published_at IS NULL")),
)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row this relay holds until its lease ends; `attempts` counts the refusals so far."""

    envelope: Envelope
    attempts: int


async def add(conn: Connection, envelope: Envelope) -> None:
    """Write the event in the caller's transaction."""
    await conn.execute(
        """
        INSERT INTO outbox (id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        """,
        envelope.id,
        envelope.type,
        envelope.subject,
        envelope.sequence,
        envelope.tenant,
        json.dumps(envelope.data, ensure_ascii=False),
        envelope.traceparent,
        envelope.tracestate,
        envelope.time,
    )


async def claim(conn: Connection, token: UUID, limit: int, lease_seconds: float) -> list[Claimed]:
    """Take up to `limit` due rows for `lease_seconds`.

    A row waits while a lower sequence of its subject is unpublished (parked included), so the events of one subject
    leave in order however many relays there are. SKIP LOCKED lets relays claim beside each other; a row that another
    one claimed in between is checked again under its lock and falls out. MATERIALIZED holds the limit: as a subquery of
    IN, the planner may run it once for each row, each time locking more.
    """
    rows = await conn.fetch(
        f"""
        WITH due AS MATERIALIZED (
            SELECT id FROM outbox AS due
            WHERE {PENDING} AND next_attempt_at <= clock_timestamp()
              AND NOT EXISTS (
                  SELECT FROM outbox AS earlier
                  WHERE earlier.subject = due.subject AND earlier.sequence < due.sequence
                    AND earlier.published_at IS NULL
              )
            ORDER BY next_attempt_at, id
            LIMIT $2
            FOR UPDATE SKIP LOCKED
        )
        UPDATE outbox
        SET claim_token = $1, next_attempt_at = clock_timestamp() + make_interval(secs => $3)
        FROM due WHERE outbox.id = due.id
        RETURNING outbox.id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at, attempts
        """,  # noqa: S608 - a constant
        token,
        limit,
        lease_seconds,
    )
    return [
        Claimed(
            envelope=Envelope(
                id=row["id"],
                type=row["type"],
                subject=row["subject"],
                sequence=row["sequence"],
                tenant=row["tenant"],
                time=row["occurred_at"],
                data=json.loads(row["data"]),
                traceparent=row["traceparent"],
                tracestate=row["tracestate"],
            ),
            attempts=row["attempts"],
        )
        for row in rows
    ]


async def mark_published(conn: Connection, token: UUID, ids: Sequence[UUID]) -> int:
    """Record that the broker confirmed these rows. Returns how many were still this relay's to mark."""
    return _count(
        await conn.execute(
            """
            UPDATE outbox SET published_at = clock_timestamp(), claim_token = NULL, last_error = NULL
            WHERE id = ANY($2) AND claim_token = $1 AND published_at IS NULL
            """,
            token,
            ids,
        )
    )


async def release(conn: Connection, token: UUID, ids: Sequence[UUID]) -> int:
    """Give claimed rows back as they were: nothing was wrong with them."""
    return _count(
        await conn.execute(
            """
            UPDATE outbox SET claim_token = NULL, next_attempt_at = clock_timestamp()
            WHERE id = ANY($2) AND claim_token = $1 AND published_at IS NULL
            """,
            token,
            ids,
        )
    )


async def refuse(conn: Connection, token: UUID, row_id: UUID, error: str, retry_in_seconds: float | None) -> int:
    """Record that the broker refused this row: try again later, or, with None, park it."""
    return _count(
        await conn.execute(
            """
            UPDATE outbox
            SET claim_token = NULL, attempts = attempts + 1, last_error = left($3, 500),
                next_attempt_at = clock_timestamp() + make_interval(secs => coalesce($4, 0)),
                parked_at = CASE WHEN $4::float8 IS NULL THEN clock_timestamp() END
            WHERE id = $2 AND claim_token = $1 AND published_at IS NULL
            """,
            token,
            row_id,
            error,
            retry_in_seconds,
        )
    )


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])


async def holds_more_than(conn: Connection, limit: int) -> bool:
    """Tell whether more than `limit` rows are pending, without counting further."""
    found: bool = await conn.fetchval(
        f"SELECT count(*) > $1 FROM (SELECT FROM outbox WHERE {PENDING} LIMIT $1 + 1) AS waiting",  # noqa: S608 - a constant
        limit,
    )
    return found


async def stats(conn: Connection) -> tuple[int, float, int]:
    """Return how many rows are pending, the age in seconds of the oldest of them, how many are parked."""
    row = await conn.fetchrow(
        f"""
        SELECT count(*) FILTER (WHERE {PENDING}) AS pending,
               coalesce(extract(epoch FROM clock_timestamp() - min(occurred_at) FILTER (WHERE {PENDING})), 0)::float8
                   AS age,
               count(*) FILTER (WHERE parked_at IS NOT NULL) AS parked
        FROM outbox WHERE published_at IS NULL
        """  # noqa: S608 - a constant
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return row["pending"], max(0.0, row["age"]), row["parked"]


@dataclass(frozen=True, slots=True)
class Unpublished:
    """A row that is not out. `claimed`: a relay has it. `behind`: the lowest unpublished sequence before its own."""

    id: UUID
    type: str
    subject: str
    sequence: int
    tenant: str
    occurred_at: datetime
    attempts: int
    last_error: str | None
    next_attempt_at: datetime
    parked_at: datetime | None
    claimed: bool
    behind: int | None


async def unpublished(conn: Connection, limit: int) -> list[Unpublished]:
    """Return up to `limit` rows that are not out: parked ones first, then pending ones, the longest due first."""
    rows = await conn.fetch(
        f"""
        SELECT id, type, subject, sequence, tenant, occurred_at, attempts, last_error, next_attempt_at, parked_at,
               claim_token IS NOT NULL AND next_attempt_at > clock_timestamp() AS claimed,
               (
                   SELECT min(earlier.sequence) FROM outbox AS earlier
                   WHERE earlier.subject = first.subject AND earlier.sequence < first.sequence
                     AND earlier.published_at IS NULL
               ) AS behind
        FROM (
            (SELECT * FROM outbox WHERE published_at IS NULL AND parked_at IS NOT NULL ORDER BY parked_at, id LIMIT $1)
            UNION ALL
            (SELECT * FROM outbox WHERE {PENDING} ORDER BY next_attempt_at, id LIMIT $1)
        ) AS first
        ORDER BY parked_at NULLS LAST, next_attempt_at, id LIMIT $1
        """,  # noqa: S608 - a constant
        limit,
    )
    return [Unpublished(**row) for row in rows]

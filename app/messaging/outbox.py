"""The outbox table: what must reach the broker, written in the transaction that made it true.

A row is pending until it is published (a broker confirmed it) or parked (refused too often; an operator decides).
`next_attempt_at` is when it may be claimed; claiming moves it to the end of the lease and leaves a token, so a relay
that dies loses nothing but time, and one that wakes up late can change nothing.
"""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Integer, Table, Text, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB

from app.db import Connection, affected, metadata
from app.messaging.envelope import Envelope

Ended = Callable[[Connection, Collection[str]], Awaitable[Collection[str]]]  # which of these subjects are over

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
    Column("resends", Integer, nullable=False, server_default=text("0")),
    Column("pending_since", DateTime(timezone=True)),  # NULL, from an older release: since it occurred
    Index("outbox_next_attempt_at_idx", "next_attempt_at", "id", postgresql_where=text(PENDING)),
    Index("outbox_subject_sequence_idx", "subject", "sequence", postgresql_where=text("published_at IS NULL")),
)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row this relay holds until its lease ends; `attempts` counts the refusals so far."""

    envelope: Envelope
    attempts: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one claimed row: confirmed, or refused with an error; then it waits, or (None) is parked."""

    id: UUID
    error: str | None = None
    retry_in_seconds: float | None = None


async def add(conn: Connection, envelope: Envelope) -> None:
    """Write the event in the caller's transaction.

    It occurred by the clock of this process, and is pending since a time on Postgres's clock, which its age goes by.
    """
    await conn.execute(
        """
        INSERT INTO outbox
            (id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at, pending_since)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, statement_timestamp())
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
    one claimed in between is checked again under its lock and falls out.

    The plan must not depend on statistics, which are those of a quiet time when an outage begins to pile rows up: as
    NOT EXISTS the order would become a join of all rows that wait with all rows that wait; min() stays one look into
    the index for each row. MATERIALIZED holds the limit: as a subquery of IN, the planner may run it once for each row,
    each time locking more. The limit is a literal, so that a plan for any values still knows how little is wanted. And
    the time is asked for once: asked for each row, it would be no condition of the index, and every row be read.
    """
    rows = await conn.fetch(
        f"""
        WITH due AS MATERIALIZED (
            SELECT id FROM outbox AS due
            WHERE {PENDING} AND next_attempt_at <= (SELECT clock_timestamp())
              AND sequence <= (
                  SELECT min(sequence) FROM outbox AS other
                  WHERE other.subject = due.subject AND other.published_at IS NULL
              )
            ORDER BY next_attempt_at, id
            LIMIT {limit:d}
            FOR UPDATE SKIP LOCKED
        )
        UPDATE outbox
        SET claim_token = $1, next_attempt_at = clock_timestamp() + make_interval(secs => $2)
        FROM due WHERE outbox.id = due.id
        RETURNING outbox.id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at, attempts
        """,  # noqa: S608 - a constant and a number
        token,
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


async def settle(conn: Connection, token: UUID, verdicts: Sequence[Verdict]) -> set[UUID]:
    """Record what the broker said about a batch, in one statement. Returns the rows that were still this relay's.

    The token says it all: no published or parked row has one. To ask for unpublished rows besides would offer the
    planner a partial index, of which it may believe in an outage that it holds a handful of rows.
    """
    rows = await conn.fetch(
        """
        UPDATE outbox
        SET claim_token = NULL, last_error = left(said.error, 500),
            published_at = CASE WHEN said.error IS NULL THEN clock_timestamp() END,
            parked_at = CASE WHEN said.error IS NOT NULL AND said.pause IS NULL THEN clock_timestamp() END,
            attempts = attempts + (said.error IS NOT NULL)::integer,
            next_attempt_at = clock_timestamp() + make_interval(secs => coalesce(said.pause, 0))
        FROM unnest($2::uuid[], $3::text[], $4::float8[]) AS said (id, error, pause)
        WHERE outbox.id = said.id AND claim_token = $1
        RETURNING outbox.id
        """,
        token,
        [verdict.id for verdict in verdicts],
        [verdict.error for verdict in verdicts],
        [verdict.retry_in_seconds for verdict in verdicts],
    )
    return {row["id"] for row in rows}


async def release(conn: Connection, token: UUID, ids: Sequence[UUID]) -> int:
    """Give claimed rows back as they were: nothing was wrong with them."""
    return affected(
        await conn.execute(
            """
            UPDATE outbox SET claim_token = NULL, next_attempt_at = clock_timestamp()
            WHERE id = ANY($2) AND claim_token = $1
            """,
            token,
            ids,
        )
    )


async def repend(conn: Connection, ids: Collection[UUID], after_seconds: float) -> list[UUID]:
    """Make rows that were published `after_seconds` ago or earlier pending again, the same rows with the same ids.

    The time doubles with each resend. Returns those that it was time for.
    """
    rows = await conn.fetch(
        """
        WITH due AS MATERIALIZED (
            SELECT id FROM outbox
            WHERE id = ANY($1)
              AND published_at <= clock_timestamp() - make_interval(secs => $2 * 2 ^ least(resends, 20))
            FOR UPDATE SKIP LOCKED
        )
        UPDATE outbox
        SET published_at = NULL, next_attempt_at = clock_timestamp(), attempts = 0, resends = resends + 1,
            pending_since = clock_timestamp()
        FROM due WHERE outbox.id = due.id
        RETURNING outbox.id
        """,
        list(ids),
        after_seconds,
    )
    return [row["id"] for row in rows]


async def prune(
    conn: Connection, after: UUID, before: UUID, limit: int, retention_seconds: float, ended: Ended
) -> tuple[int, UUID | None]:
    """Look at the next `limit` rows between these ids, oldest first; delete what was published long ago.

    That is: published `retention_seconds` ago, and its subject has `ended`, so that nobody can need it again. Rows that
    stay are stepped over. Returns how many were deleted, and where to go on; None: at the end.
    """
    rows = await conn.fetch(
        f"SELECT id, subject FROM outbox WHERE id > $1 AND id < $2 ORDER BY id LIMIT {limit:d}",  # noqa: S608 - a number
        after,
        before,
    )
    if not rows:
        return 0, None
    last = rows[-1]["id"]
    deleted = await conn.execute(
        """
        DELETE FROM outbox WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM outbox
            WHERE id > $1 AND id <= $2 AND subject = ANY($3)
              AND published_at <= clock_timestamp() - make_interval(secs => $4)
            FOR UPDATE SKIP LOCKED
        ))
        """,
        after,
        last,
        await ended(conn, {row["subject"] for row in rows}),
        retention_seconds,
    )
    return affected(deleted), last if len(rows) == limit else None


async def count_pending(conn: Connection, at_most: int) -> int:
    """Return how many rows are pending, without counting further than `at_most`."""
    found: int = await conn.fetchval(
        f"SELECT count(*) FROM (SELECT FROM outbox WHERE {PENDING} LIMIT $1) AS waiting",  # noqa: S608 - a constant
        at_most,
    )
    return found

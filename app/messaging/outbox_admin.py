"""Queries on unpublished outbox rows, for metrics and operators. The relay's queries are in `outbox`."""

from collections.abc import Collection
from datetime import datetime
from uuid import UUID

from app.db import Connection
from app.messaging.outbox import PENDING
from app.values import immutable


@immutable
class UnpublishedCounts:
    """How many rows are pending and parked, and since when the oldest pending one is; None: none is. `at`: now.

    The times are those of Postgres's clock.
    """

    pending: int
    oldest_pending_at: datetime | None
    parked: int
    at: datetime


async def count_unpublished(conn: Connection) -> UnpublishedCounts:
    """Count the unpublished rows."""
    row = await conn.fetchrow(
        f"""
        SELECT count(*) FILTER (WHERE {PENDING}) AS pending,
               min(coalesce(pending_since, occurred_at)) FILTER (WHERE {PENDING}) AS oldest_pending_at,
               count(*) FILTER (WHERE parked_at IS NOT NULL) AS parked, clock_timestamp() AS at
        FROM outbox WHERE published_at IS NULL
        """  # noqa: S608 - a constant
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return UnpublishedCounts(**row)


async def stats(conn: Connection) -> tuple[int, float, int]:
    """Return the number of pending rows, the age in seconds of the oldest, and the number of parked rows."""
    counts = await count_unpublished(conn)
    oldest_at = counts.oldest_pending_at or counts.at
    return counts.pending, max(0.0, (counts.at - oldest_at).total_seconds()), counts.parked


async def depths(conn: Connection, types: Collection[str]) -> tuple[int, int]:
    """Return the numbers of pending and of parked rows of these types."""
    row = await conn.fetchrow(
        f"""
        SELECT count(*) FILTER (WHERE {PENDING}) AS pending, count(*) FILTER (WHERE parked_at IS NOT NULL) AS parked
        FROM outbox WHERE published_at IS NULL AND type = ANY($1)
        """,  # noqa: S608 - a constant
        list(types),
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return row["pending"], row["parked"]


@immutable
class UnpublishedRow:
    """An unpublished row. `claimed`: a relay holds it. `waits_for`: the lowest unpublished sequence before its own."""

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
    waits_for: int | None


async def list_unpublished(conn: Connection, limit: int, *, parked_only: bool = False) -> list[UnpublishedRow]:
    """Return up to `limit` unpublished rows: parked ones first, then pending ones, longest due first."""
    rows = await conn.fetch(
        f"""
        SELECT id, type, subject, sequence, tenant, occurred_at, attempts, last_error, next_attempt_at, parked_at,
               claim_token IS NOT NULL AND next_attempt_at > clock_timestamp() AS claimed,
               (
                   SELECT min(earlier.sequence) FROM outbox AS earlier
                   WHERE earlier.subject = first.subject AND earlier.sequence < first.sequence
                     AND earlier.published_at IS NULL
               ) AS waits_for
        FROM (
            (SELECT * FROM outbox WHERE published_at IS NULL AND parked_at IS NOT NULL ORDER BY parked_at, id LIMIT $1)
            UNION ALL
            (
                SELECT * FROM outbox WHERE {PENDING}
                ORDER BY next_attempt_at, id LIMIT CASE WHEN $2 THEN 0 ELSE $1 END
            )
        ) AS first
        ORDER BY parked_at NULLS LAST, next_attempt_at, id LIMIT $1
        """,  # noqa: S608 - a constant
        limit,
        parked_only,
    )
    return [UnpublishedRow(**row) for row in rows]


@immutable
class ParkedRow:
    """A parked row, with its last error and since when it is parked."""

    id: UUID
    type: str
    subject: str
    tenant: str
    attempts: int
    last_error: str
    parked_at: datetime


async def count_parked(conn: Connection, types: Collection[str]) -> tuple[int, datetime]:
    """Return how many rows of these types are parked, and the time of counting by Postgres's clock."""
    row = await conn.fetchrow(
        """
        SELECT count(*) AS number, clock_timestamp() AS at
        FROM outbox WHERE published_at IS NULL AND parked_at IS NOT NULL AND type = ANY($1::text[])
        """,
        list(types),
    )
    assert row is not None  # noqa: S101 - bug: an aggregate always has its row
    return row["number"], row["at"]


async def parked(
    conn: Connection, types: Collection[str], until: datetime, after: tuple[datetime, UUID] | None, limit: int
) -> list[ParkedRow]:
    """Return the next `limit` rows of these types that were parked at `until` or before, longest parked first.

    `after`: `parked_at` and id of the last row already returned.
    """
    parked_at, row_id = after or (None, None)
    rows = await conn.fetch(
        """
        SELECT id, type, subject, tenant, attempts, coalesce(last_error, '') AS last_error, parked_at
        FROM outbox
        WHERE published_at IS NULL AND parked_at <= $1 AND type = ANY($2::text[])
          AND ($3::timestamptz IS NULL OR (parked_at, id) > ($3, $4::uuid))
        ORDER BY parked_at, id LIMIT $5
        """,
        until,
        list(types),
        parked_at,
        row_id,
        limit,
    )
    return [ParkedRow(**row) for row in rows]


async def requeue(conn: Connection, ids: Collection[UUID]) -> list[str]:
    """Make parked rows pending again, with all their attempts. Returns the subjects of the rows that were parked.

    The last error stays on the row until it is published.
    """
    rows = await conn.fetch(
        """
        UPDATE outbox
        SET parked_at = NULL, attempts = 0, next_attempt_at = clock_timestamp(), claim_token = NULL,
            pending_since = clock_timestamp()
        WHERE id = ANY($1::uuid[]) AND parked_at IS NOT NULL AND published_at IS NULL
        RETURNING subject
        """,
        list(ids),
    )
    return [row["subject"] for row in rows]


async def lock_parked(conn: Connection, limit: int) -> list[UUID]:
    """Lock up to `limit` parked rows, longest parked first, and return their ids. Skip rows that others have locked."""
    rows = await conn.fetch(
        """
        SELECT id FROM outbox WHERE published_at IS NULL AND parked_at IS NOT NULL
        ORDER BY parked_at, id LIMIT $1 FOR UPDATE SKIP LOCKED
        """,
        limit,
    )
    return [row["id"] for row in rows]


async def exists(conn: Connection, row_id: UUID) -> bool:
    """Return whether the outbox still has this row."""
    return await conn.fetchval("SELECT true FROM outbox WHERE id = $1", row_id) is True


async def send_again(conn: Connection, row_id: UUID) -> None:
    """Make a published or parked row pending, with all its attempts. A pending row stays unchanged."""
    await conn.execute(
        """
        UPDATE outbox
        SET first_published_at = coalesce(first_published_at, published_at), published_at = NULL, parked_at = NULL,
            attempts = 0, next_attempt_at = clock_timestamp(), claim_token = NULL, pending_since = clock_timestamp()
        WHERE id = $1 AND (published_at IS NOT NULL OR parked_at IS NOT NULL)
        """,
        row_id,
    )


async def discard(conn: Connection, ids: Collection[UUID]) -> None:
    """Mark parked rows as published, so they are never sent again.

    The pruner deletes them once their orders are final, as it does with purged messages of a broker.
    """
    await conn.execute(
        """
        UPDATE outbox SET published_at = clock_timestamp(), parked_at = NULL
        WHERE id = ANY($1::uuid[]) AND parked_at IS NOT NULL AND published_at IS NULL
        """,
        list(ids),
    )

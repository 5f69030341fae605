"""The outbox table: events for the broker, written in the transaction of the change that they announce.

A row is pending until it is published (the broker confirmed it) or parked (refused too often; an operator decides). A
row may be claimed from `next_attempt_at` on. A claim moves `next_attempt_at` to the end of the lease and sets a token:
a relay that dies delays its rows by one lease, and a relay that resumes after its lease changes nothing.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import field
from datetime import datetime
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Integer, Table, Text, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB

from app.claim_hint import START
from app.db import Connection, affected, metadata
from app.messaging.envelope import Envelope, JsonText
from app.values import immutable

SelectFinished = Callable[[Connection, Collection[str]], Awaitable[Collection[str]]]  # which subjects are finished

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
    Column("pending_since", DateTime(timezone=True)),  # NULL in rows of older releases: use `occurred_at`
    Column("first_published_at", DateTime(timezone=True)),  # of a row that was made pending again after that
    Index("outbox_next_attempt_at_idx", "next_attempt_at", "id", postgresql_where=text(PENDING)),
    Index("outbox_subject_sequence_idx", "subject", "sequence", postgresql_where=text("published_at IS NULL")),
)


@immutable
class ClaimedRow:
    """A row that this relay holds until its lease ends. `attempts`: refusals so far. `resends`: of a published row.

    `due_at`: from when the row could be claimed.
    """

    envelope: Envelope
    attempts: int
    resends: int = 0
    due_at: datetime = field(default=START, compare=False)


@immutable
class PublishRecord:
    """The result of one claimed row. `error` None: confirmed; else refused. `retry_in_seconds` None: parked."""

    id: UUID
    error: str | None = None
    retry_in_seconds: float | None = None


async def add(conn: Connection, envelopes: Sequence[Envelope]) -> None:
    """Insert the events in the caller's transaction.

    `occurred_at` comes from this process's clock; `pending_since`, the start of the row's age, from Postgres's.
    """
    await conn.execute(
        """
        INSERT INTO outbox
            (id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at, pending_since)
        SELECT given.*, statement_timestamp()
        FROM unnest($1::uuid[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::jsonb[], $7::text[], $8::text[],
                    $9::timestamptz[]) AS given
        """,
        [envelope.id for envelope in envelopes],
        [envelope.type for envelope in envelopes],
        [envelope.subject for envelope in envelopes],
        [envelope.sequence for envelope in envelopes],
        [envelope.tenant for envelope in envelopes],
        [envelope.json() for envelope in envelopes],
        [envelope.traceparent for envelope in envelopes],
        [envelope.tracestate for envelope in envelopes],
        [envelope.time for envelope in envelopes],
    )


async def claim(
    conn: Connection, token: UUID, limit: int, lease_seconds: float, since: datetime = START
) -> list[ClaimedRow]:
    """Claim up to `limit` rows for `lease_seconds` that became due at `since` or later; see `ClaimHint`.

    A row is not due while a row of the same subject with a lower sequence is unpublished (parked rows included), so the
    events of one subject leave in order with any number of relays. SKIP LOCKED lets relays claim in parallel; Postgres
    rechecks a row that another relay claimed in between, and drops it.

    The plan must not depend on statistics: when an outage fills the table, they still describe an empty one. With NOT
    EXISTS, the planner may join all waiting rows with each other; `min()` stays one index lookup per row. MATERIALIZED
    keeps the limit: inside IN, the planner may run the subquery once per row and lock more rows each time. The limit is
    a literal, so a generic plan knows it too. `clock_timestamp()` is volatile; in a subselect it runs once, so Postgres
    can use the index.
    """
    rows = await conn.fetch(
        f"""
        WITH due AS MATERIALIZED (
            SELECT id, next_attempt_at FROM outbox AS due
            WHERE {PENDING} AND next_attempt_at >= $3 AND next_attempt_at <= (SELECT clock_timestamp())
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
        RETURNING outbox.id, type, subject, sequence, tenant, data, traceparent, tracestate, occurred_at, attempts,
                  resends, due.next_attempt_at AS due_at
        """,  # noqa: S608 - a constant and a number
        token,
        lease_seconds,
        since,
    )
    return [
        ClaimedRow(
            envelope=Envelope(
                id=row["id"],
                type=row["type"],
                subject=row["subject"],
                sequence=row["sequence"],
                tenant=row["tenant"],
                time=row["occurred_at"],
                data=JsonText(row["data"]),
                traceparent=row["traceparent"],
                tracestate=row["tracestate"],
            ),
            attempts=row["attempts"],
            due_at=row["due_at"],
            resends=row["resends"],
        )
        for row in rows
    ]


async def record_results(conn: Connection, token: UUID, records: Sequence[PublishRecord]) -> set[UUID]:
    """Record the results of a batch in one statement. Return the ids of the rows that this relay still held.

    The token is the only condition: no published or parked row has one. A condition on unpublished rows would let the
    planner choose a partial index that its statistics show as nearly empty, although an outage has filled it.
    """
    rows = await conn.fetch(
        """
        UPDATE outbox
        SET claim_token = NULL, last_error = left(result.error, 500),
            published_at = CASE WHEN result.error IS NULL THEN clock_timestamp() END,
            parked_at = CASE WHEN result.error IS NOT NULL AND result.pause IS NULL THEN clock_timestamp() END,
            attempts = attempts + (result.error IS NOT NULL)::integer,
            next_attempt_at = clock_timestamp() + make_interval(secs => coalesce(result.pause, 0))
        FROM unnest($2::uuid[], $3::text[], $4::float8[]) AS result (id, error, pause)
        WHERE outbox.id = result.id AND claim_token = $1
        RETURNING outbox.id
        """,
        token,
        [record.id for record in records],
        [record.error for record in records],
        [record.retry_in_seconds for record in records],
    )
    return {row["id"] for row in rows}


async def release(conn: Connection, token: UUID, ids: Sequence[UUID]) -> int:
    """Release claimed rows unchanged, without spending an attempt."""
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


async def republish(conn: Connection, ids: Collection[UUID], after_seconds: float) -> list[UUID]:
    """Make rows pending again, with the same ids, if they were published at least `after_seconds` ago.

    `after_seconds` doubles with each resend of a row. Returns the ids of the rows that were due.
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
        SET published_at = NULL, first_published_at = coalesce(first_published_at, published_at),
            next_attempt_at = clock_timestamp(), attempts = 0, resends = resends + 1,
            pending_since = clock_timestamp()
        FROM due WHERE outbox.id = due.id
        RETURNING outbox.id
        """,
        list(ids),
        after_seconds,
    )
    return [row["id"] for row in rows]


async def prune(
    conn: Connection, after: UUID, before: UUID, limit: int, retention_seconds: float, select_finished: SelectFinished
) -> tuple[int, UUID | None]:
    """Scan the next `limit` rows between these ids, oldest first, and delete those past their retention.

    A row may go if it was published at least `retention_seconds` ago and its subject is finished. Returns how many rows
    were deleted, and the id to continue after; None: there are no more rows.
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
        await select_finished(conn, {row["subject"] for row in rows}),
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

"""The table of idempotency keys: which request has a key, and the response that the key stands for.

The row is the first write in the request's own transaction. Two requests with one key conflict at the primary key: the
second waits until the first commits (then it finds the response) or rolls back (then it continues as the first).
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Column, DateTime, Index, LargeBinary, SmallInteger, Table, Text

from app.db import COMMAND_TIMEOUT_SECONDS, Connection, affected, metadata
from app.idempotency.key import IdempotencyKey
from app.values import immutable

table = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("fingerprint_version", SmallInteger, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("location", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Index("idempotency_keys_expires_at_idx", "expires_at"),
)


@immutable
class StoredResponse:
    """A finished response, byte for byte. `remaining_seconds`: until its key expires."""

    status: int
    location: str
    body: bytes
    replayed: bool = False
    remaining_seconds: float = 0.0


PLACEHOLDER = StoredResponse(0, "", b"")  # never committed: `complete` replaces it first


@immutable
class KeyRecord:
    """A key's row: the response, the request it belongs to, and its lifetime."""

    fingerprint: bytes
    fingerprint_version: int
    response: StoredResponse
    created_at: datetime
    expires_at: datetime


ACQUIRE = """
    INSERT INTO idempotency_keys AS k
        (tenant, key, fingerprint, fingerprint_version, status, location, body, created_at, expires_at)
    SELECT given.*, statement_timestamp(), statement_timestamp() + make_interval(secs => $8)
    FROM unnest($1::text[], $2::text[], $3::bytea[], $4::smallint[], $5::smallint[], $6::text[], $7::bytea[]) AS given
    ON CONFLICT (tenant, key) DO UPDATE
    SET fingerprint = excluded.fingerprint, fingerprint_version = excluded.fingerprint_version,
        status = excluded.status, location = excluded.location, body = excluded.body,
        created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE k.expires_at <= clock_timestamp()
    RETURNING tenant, key
"""


async def acquire(
    conn: Connection, key: IdempotencyKey, response: StoredResponse, ttl_seconds: float, wait_seconds: float
) -> bool:
    """Write the key's row, or take over an expired one. Return False when the key is in use.

    Waits for another request with the key for the transaction's lock_timeout (`wait_seconds`), then raises 55P03.
    """
    return bool(await acquire_free(conn, [(key, response)], ttl_seconds, wait_seconds))


async def acquire_free(
    conn: Connection,
    responses: Sequence[tuple[IdempotencyKey, StoredResponse]],
    ttl_seconds: float,
    wait_seconds: float = 0.0,
) -> set[tuple[str, str]]:
    """Write the rows of different keys, or take over expired ones. Return tenant and key of those not in use.

    The rows are written in the order of their keys, so two batches cannot wait for each other. Waits for each as
    `acquire` does.
    """
    ordered = sorted(responses, key=lambda pair: (pair[0].tenant, pair[0].key))
    rows = await conn.fetch(
        ACQUIRE,
        [key.tenant for key, _ in ordered],
        [key.key for key, _ in ordered],
        [key.fingerprint for key, _ in ordered],
        [key.fingerprint_version for key, _ in ordered],
        [response.status for _, response in ordered],
        [response.location for _, response in ordered],
        [response.body for _, response in ordered],
        ttl_seconds,
        timeout=wait_seconds + COMMAND_TIMEOUT_SECONDS,
    )
    return {(row["tenant"], row["key"]) for row in rows}


async def find(conn: Connection, tenant: str, key: str) -> KeyRecord | None:
    """Return the key's row, None if there is none or it has expired."""
    row = await conn.fetchrow(
        """
        SELECT fingerprint, fingerprint_version, status, location, body, created_at, expires_at,
               extract(epoch FROM expires_at - clock_timestamp())::float8 AS remaining_seconds
        FROM idempotency_keys
        WHERE tenant = $1 AND key = $2 AND expires_at > clock_timestamp()
        """,
        tenant,
        key,
    )
    if row is None:
        return None
    response = StoredResponse(
        row["status"], row["location"], row["body"], replayed=True, remaining_seconds=row["remaining_seconds"]
    )
    return KeyRecord(row["fingerprint"], row["fingerprint_version"], response, row["created_at"], row["expires_at"])


async def complete(conn: Connection, key: IdempotencyKey, response: StoredResponse) -> None:
    """Store the response in the key's row, which this transaction has acquired."""
    await conn.execute(
        "UPDATE idempotency_keys SET status = $3, location = $4, body = $5 WHERE tenant = $1 AND key = $2",
        key.tenant,
        key.key,
        response.status,
        response.location,
        response.body,
    )


async def prune(conn: Connection, limit: int) -> int:
    """Delete up to `limit` expired rows. Return how many were deleted.

    `clock_timestamp()` is volatile; in a subselect it runs once, so Postgres can use the index.
    """
    status = await conn.execute(
        f"""
        DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM idempotency_keys WHERE expires_at <= (SELECT clock_timestamp())
            ORDER BY expires_at LIMIT {limit:d} FOR UPDATE SKIP LOCKED
        ))
        """  # noqa: S608 - a number
    )
    return affected(status)

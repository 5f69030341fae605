"""The idempotency key row: who may use a key, and the answer that it stands for.

The row is written first in the order's own transaction, complete with the answer, so key, order and answer commit
together or not at all. Two requests with one key meet at the primary key: the second waits until the first commits
(then it finds the answer) or rolls back (then it goes on as the first).
"""

from dataclasses import dataclass
from datetime import datetime

from app.db import COMMAND_TIMEOUT_SECONDS, Connection, affected


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's idempotency key and the request it came with."""

    tenant: str
    key: str
    fingerprint: bytes
    fingerprint_version: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer, to the byte. `remaining_seconds`: how long its key still stands for it."""

    status: int
    location: str
    body: bytes
    replayed: bool = False
    remaining_seconds: float = 0.0


NOT_YET = Answer(0, "", b"")  # never committed: `set_answer` comes before the commit


@dataclass(frozen=True, slots=True)
class Stored:
    """A key row: the answer, the request it belongs to, and its lifetime."""

    fingerprint: bytes
    fingerprint_version: int
    answer: Answer
    created_at: datetime
    expires_at: datetime


async def take(conn: Connection, key: Key, answer: Answer, ttl_seconds: float, wait_seconds: float) -> bool:
    """Write the key's row, taking over an expired one; False when the key is in use.

    Waits for another request with the key as long as the transaction's lock_timeout says, `wait_seconds` (then 55P03).
    """
    return (
        await conn.fetchval(
            """
            INSERT INTO idempotency_keys AS k
                (tenant, key, fingerprint, fingerprint_version, status, location, body, created_at, expires_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7,
                statement_timestamp(), statement_timestamp() + make_interval(secs => $8))
            ON CONFLICT (tenant, key) DO UPDATE
            SET fingerprint = excluded.fingerprint, fingerprint_version = excluded.fingerprint_version,
                status = excluded.status, location = excluded.location, body = excluded.body,
                created_at = excluded.created_at, expires_at = excluded.expires_at
            WHERE k.expires_at <= clock_timestamp()
            RETURNING true
            """,
            key.tenant,
            key.key,
            key.fingerprint,
            key.fingerprint_version,
            answer.status,
            answer.location,
            answer.body,
            ttl_seconds,
            timeout=wait_seconds + COMMAND_TIMEOUT_SECONDS,
        )
        is True
    )


async def find(conn: Connection, tenant: str, key: str) -> Stored | None:
    """Return the key's row, unless it has expired."""
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
    answer = Answer(
        row["status"], row["location"], row["body"], replayed=True, remaining_seconds=row["remaining_seconds"]
    )
    return Stored(row["fingerprint"], row["fingerprint_version"], answer, row["created_at"], row["expires_at"])


async def set_answer(conn: Connection, key: Key, answer: Answer) -> None:
    """Give the key's row, taken in this transaction, the answer that the act came to."""
    await conn.execute(
        "UPDATE idempotency_keys SET status = $3, location = $4, body = $5 WHERE tenant = $1 AND key = $2",
        key.tenant,
        key.key,
        answer.status,
        answer.location,
        answer.body,
    )


async def prune(conn: Connection, limit: int) -> int:
    """Delete up to `limit` expired rows. Returns how many there were.

    The time is asked for once: asked for each row, it would be no condition of the index, and every living key be read.
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

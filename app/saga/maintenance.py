"""Queries for maintenance: find orders without a saga, and delete sagas past their retention."""

import itertools
from datetime import UTC, datetime, timedelta
from uuid import UUID

from app import db
from app.orders.model import FINAL
from app.saga.queries import MAX_STEPS

Place = tuple[str, datetime, UUID]  # tenant, placed_at and id of the last scanned order
FIRST: Place = ("", datetime.min.replace(tzinfo=UTC), UUID(int=0))
# The sagas to prune. The time is a parameter, so that one statement counts the same rows that the next one deletes.
ENDED = "finished_at <= $3 AND (SELECT status FROM orders WHERE orders.id = sagas.id) = ANY($4)"


async def scan_unstarted(
    conn: db.Connection, after: Place, limit: int, age_seconds: float
) -> tuple[list[UUID], Place | None]:
    """Scan the next `limit` pending orders after this place.

    Return the orders that are at least `age_seconds` old and have no saga, and the place to continue from; None at the
    end. The age is that of the event's outbox row, because `placed_at` comes from the clock of the process that
    accepted the order. An event that was resent before is always old enough.
    """
    rows = await conn.fetch(
        f"""
        SELECT tenant, placed_at, id,
               (SELECT sagas.id FROM sagas WHERE sagas.id = orders.id) IS NULL AND coalesce((
                   SELECT resends > 0
                       OR coalesce(pending_since, occurred_at) <= clock_timestamp() - make_interval(secs => $4)
                   FROM outbox WHERE outbox.id = orders.id
               ), true) AS unstarted
        FROM orders
        WHERE status = 'pending' AND (tenant, placed_at, id) > ($1, $2, $3)
        ORDER BY tenant, placed_at, id LIMIT {limit:d}
        """,  # noqa: S608 - a number
        *after,
        age_seconds,
    )
    last = rows[-1] if len(rows) == limit else None
    found = [UUID(int=row["id"].int) for row in rows if row["unstarted"]]
    return found, (last["tenant"], last["placed_at"], last["id"]) if last else None


async def prune(
    conn: db.Connection, after: UUID, before: UUID, limit: int, retention_seconds: float
) -> tuple[int, UUID | None]:
    """Scan the next `limit` sagas between these ids, oldest first; delete those past their retention with their logs.

    The order stays and is final, so its saga can never start again. Return how many sagas were deleted, and the id to
    continue from; None at the end.

    One call deletes at most `MAX_STEPS` log rows. Earlier calls shorten a longer log to the rows that operators can
    see; those are deleted together with their saga, so that no operator sees a part of them.
    """
    ended_before = await db.now(conn) - timedelta(seconds=retention_seconds)
    rows = await conn.fetch(
        f"""
        SELECT id, CASE WHEN {ENDED} THEN (
            SELECT count(*) FROM (SELECT FROM saga_steps WHERE saga_id = sagas.id LIMIT {MAX_STEPS + 1:d}) AS log
        ) ELSE 0 END AS lines
        FROM sagas WHERE id > $1 AND id < $2 ORDER BY id LIMIT {limit:d}
        """,  # noqa: S608 - a constant and numbers
        after,
        before,
        ended_before,
        sorted(FINAL),
    )
    sums = itertools.accumulate(row["lines"] for row in rows)
    fitting = [row["id"] for row, lines in zip(rows, sums, strict=True) if lines <= MAX_STEPS]
    if not rows:
        return 0, None
    if not fitting:
        too_long = rows[0]["id"]
        return 0, after if await _shorten_log(conn, too_long) else too_long
    is_end = len(fitting) == len(rows) < limit
    return await _delete(conn, after, fitting[-1], ended_before), None if is_end else fitting[-1]


async def _delete(conn: db.Connection, after: UUID, last: UUID, ended_before: datetime) -> int:
    """Delete ended sagas in this range with their logs, except those locked by another janitor. Return how many."""
    deleted: int = await conn.fetchval(
        f"""
        WITH deleted AS (
            DELETE FROM sagas WHERE ctid = ANY (ARRAY (
                SELECT ctid FROM sagas WHERE id > $1 AND id <= $2 AND {ENDED} FOR UPDATE SKIP LOCKED
            ))
            RETURNING id
        ), log AS (
            DELETE FROM saga_steps WHERE saga_id = ANY (ARRAY (SELECT id FROM deleted))
        )
        SELECT count(*) FROM deleted
        """,  # noqa: S608 - a constant
        after,
        last,
        ended_before,
        sorted(FINAL),
    )
    return deleted


async def _shorten_log(conn: db.Connection, saga_id: UUID) -> int:
    """Delete up to `MAX_STEPS` log rows before the last `MAX_STEPS`, unless another janitor has locked this saga.

    Return how many. OFFSET 0 stops the planner from reading the logs of all sagas in primary key order.
    """
    status = await conn.execute(
        f"""
        DELETE FROM saga_steps WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM (
                SELECT ctid, id FROM saga_steps
                WHERE saga_id = (SELECT id FROM sagas WHERE id = $1 FOR UPDATE SKIP LOCKED) OFFSET 0
            ) AS log
            ORDER BY id DESC OFFSET {MAX_STEPS:d} LIMIT {MAX_STEPS:d}
        ))
        """,  # noqa: S608 - numbers
        saga_id,
    )
    return db.affected(status)

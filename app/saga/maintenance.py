"""What maintenance asks of the sagas: which orders have not started, which sagas are past their retention."""

import itertools
from datetime import UTC, datetime, timedelta
from uuid import UUID

from app import db
from app.orders.model import FINAL
from app.saga.queries import MAX_STEPS

Place = tuple[str, datetime, UUID]  # tenant, placed_at, id of the order that a look went up to
FIRST: Place = ("", datetime.min.replace(tzinfo=UTC), UUID(int=0))
# What may be pruned. The bound is a parameter, so that rows counted by one statement are those that the next deletes.
ENDED = "finished_at <= $3 AND (SELECT status FROM orders WHERE orders.id = sagas.id) = ANY($4)"


async def unstarted(
    conn: db.Connection, after: Place, limit: int, age_seconds: float
) -> tuple[list[UUID], Place | None]:
    """Look at the next `limit` pending orders after this place.

    Returns those that were placed `age_seconds` ago or earlier and have no saga, and where to go on; None: at the end.
    An order's age is that of its event's row, since `placed_at` is by the clock of the process that took the order. A
    row that was sent again was old enough before.
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
    """Look at the next `limit` sagas between these ids, oldest first; delete those that ended long ago, with their log.

    The order stays, and it has ended: that is what keeps its saga from ever starting again. Returns how many were
    deleted, and where to go on; None: at the end.

    A call deletes `MAX_STEPS` lines of logs at most. A longer log is shortened first, in as many calls as it takes, to
    the lines that operators are shown; these go together with their saga, so that no operator sees half of them.
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
    """Delete the ended sagas among these with their logs, unless another janitor is at them. Returns how many."""
    deleted: int = await conn.fetchval(
        f"""
        WITH gone AS (
            DELETE FROM sagas WHERE ctid = ANY (ARRAY (
                SELECT ctid FROM sagas WHERE id > $1 AND id <= $2 AND {ENDED} FOR UPDATE SKIP LOCKED
            ))
            RETURNING id
        ), log AS (
            DELETE FROM saga_steps WHERE saga_id = ANY (ARRAY (SELECT id FROM gone))
        )
        SELECT count(*) FROM gone
        """,  # noqa: S608 - a constant
        after,
        last,
        ended_before,
        sorted(FINAL),
    )
    return deleted


async def _shorten_log(conn: db.Connection, saga_id: UUID) -> int:
    """Delete up to `MAX_STEPS` lines before the last `MAX_STEPS`, unless another janitor is at this saga.

    Returns how many. OFFSET 0 keeps the planner from reading the logs of all sagas in the order of the primary key.
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

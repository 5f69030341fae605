"""What metrics, operators and the janitor ask of the sagas: how many there are, what never began, what may go."""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from app import db
from app.orders.status import FINAL

Place = tuple[str, datetime, UUID]  # tenant, placed_at, id of the order that a look went up to
FIRST: Place = ("", datetime.min.replace(tzinfo=UTC), UUID(int=0))


class Stats(NamedTuple):
    """Unfinished sagas: how many by their order's status, the age of the oldest, how many need an operator."""

    in_flight: dict[str, int]
    oldest_age_seconds: float
    needs_operator: int


async def stats(conn: db.Connection) -> Stats:
    """Look at the sagas that have not ended."""
    rows = await conn.fetch(
        """
        SELECT o.status, count(*) AS unfinished,
               extract(epoch FROM clock_timestamp() - min(s.started_at))::float8 AS age,
               count(*) FILTER (WHERE s.needs_operator_at <= clock_timestamp()) AS needs_operator
        FROM sagas s JOIN orders o USING (id) WHERE s.finished_at IS NULL GROUP BY o.status
        """
    )
    return Stats(
        {row["status"]: row["unfinished"] for row in rows},
        max((row["age"] for row in rows), default=0.0),
        sum(row["needs_operator"] for row in rows),
    )


async def unstarted(
    conn: db.Connection, after: Place, limit: int, age_seconds: float
) -> tuple[list[UUID], Place | None]:
    """Look at the next `limit` pending orders after this place that are older than `age_seconds`.

    Returns those without a saga, and where to go on; None: at the end.
    """
    rows = await conn.fetch(
        f"""
        SELECT tenant, placed_at, id, (SELECT sagas.id FROM sagas WHERE sagas.id = orders.id) IS NULL AS unstarted
        FROM orders
        WHERE status = 'pending' AND (tenant, placed_at, id) > ($1, $2, $3)
          AND placed_at <= clock_timestamp() - make_interval(secs => $4)
        ORDER BY tenant, placed_at, id LIMIT {limit:d}
        """,  # noqa: S608 - a number
        *after,
        age_seconds,
    )
    last = rows[-1] if len(rows) == limit else None
    found = [UUID(int=row["id"].int) for row in rows if row["unstarted"]]
    return found, (last["tenant"], last["placed_at"], last["id"]) if last else None


async def prune(conn: db.Connection, after: UUID, limit: int, retention_seconds: float) -> tuple[int, UUID | None]:
    """Look at the next `limit` sagas after this one, oldest first; delete those that ended long since, with their log.

    The order stays, and it has ended: that is what keeps its saga from ever starting again. Returns how many were
    deleted, and where to go on; None: at the sagas that are too young.
    """
    rows = await conn.fetch(
        f"SELECT id FROM sagas WHERE id > $1 AND id < $2 ORDER BY id LIMIT {limit:d}",  # noqa: S608 - a number
        after,
        db.first_id(retention_seconds),
    )
    if not rows:
        return 0, None
    last = rows[-1]["id"]
    deleted: int = await conn.fetchval(
        """
        WITH gone AS (
            DELETE FROM sagas WHERE ctid = ANY (ARRAY (
                SELECT ctid FROM sagas
                WHERE id > $1 AND id <= $2 AND finished_at <= clock_timestamp() - make_interval(secs => $3)
                  AND (SELECT status FROM orders WHERE orders.id = sagas.id) = ANY($4)
                FOR UPDATE SKIP LOCKED
            ))
            RETURNING id
        ), log AS (
            DELETE FROM saga_steps WHERE saga_id = ANY (ARRAY (SELECT id FROM gone))
        )
        SELECT count(*) FROM gone
        """,
        after,
        last,
        retention_seconds,
        sorted(FINAL),
    )
    return deleted, last if len(rows) == limit else None


async def still_unstarted(conn: db.Connection, order_ids: Collection[UUID]) -> set[UUID]:
    """Return those of these orders that are pending and have no saga: their `order.placed` is still to be handled."""
    rows = await conn.fetch(
        """
        SELECT id FROM orders
        WHERE id = ANY($1::uuid[]) AND status = 'pending'
          AND NOT EXISTS (SELECT FROM sagas WHERE sagas.id = orders.id)
        """,
        list(order_ids),
    )
    return {UUID(int=row["id"].int) for row in rows}

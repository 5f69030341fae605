"""What Postgres reports about itself: the oldest snapshot in use, and the dead tuples of the hot tables."""

from app import db

# Tables with many updates and deletes: their speed depends on vacuum.
HOT_TABLES = ("idempotency_keys", "inbox", "orders", "outbox", "saga_steps", "sagas")


async def oldest_snapshot_age_seconds(conn: db.Connection) -> float | None:
    """Return the age of the oldest transaction that keeps vacuum from removing dead rows; 0 if there is none.

    None if the role may not see the sessions of other roles (it is not a member of `pg_read_all_stats`). The snapshot
    of a vacuum does not count: other vacuums ignore it. A replication slot has no time, so it does not count either.
    """
    seconds: float | None = await conn.fetchval(
        """
        SELECT CASE WHEN pg_has_role('pg_read_all_stats', 'USAGE') THEN (
            SELECT greatest(coalesce(max(extract(epoch FROM clock_timestamp() - started_at)), 0), 0)::float8 FROM (
                SELECT xact_start AS started_at FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()
                  AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND backend_type <> 'autovacuum worker'
                UNION ALL
                SELECT prepared FROM pg_prepared_xacts WHERE database = current_database()
            ) AS transactions
        ) END
        """
    )
    return seconds


async def dead_tuples(conn: db.Connection) -> dict[str, int]:
    """Return the estimated number of dead tuples of each hot table; none if Postgres does not count them."""
    rows = await conn.fetch(
        """
        SELECT hot.name, statistics.n_dead_tup
        FROM unnest($1::text[]) AS hot (name)
        JOIN pg_stat_user_tables AS statistics ON statistics.relid = to_regclass(hot.name)
        WHERE current_setting('track_counts')::boolean
        """,
        list(HOT_TABLES),
    )
    return {row["name"]: row["n_dead_tup"] for row in rows}

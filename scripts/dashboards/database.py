"""PostgreSQL as the service sees it, and the upkeep of its tables."""

from scripts.dashboards.model import Dashboard, Panel, Query

DATABASE = Dashboard(
    "database",
    "database",
    "Is Postgres in good order, and does the janitor keep it so?",
    [
        Panel(
            "How many connections are in use?",
            "By process. At ORDERS_DATABASE_POOL_SIZE, requests wait, then get a 503.",
            "short",
            [Query("db_pool_in_use", "{{instance}}")],
        ),
        Panel(
            "Does a transaction hold up vacuum?",
            "Age of the oldest one. No line: the role of the service may not see other sessions (docs/operations.md).",
            "s",
            [Query("max(database_oldest_snapshot_age_seconds)", "oldest transaction")],
            limit=900,
            alert="DatabaseSnapshotHeld",
        ),
        Panel(
            "Does vacuum keep up?",
            "Estimated dead rows by table. A sawtooth is normal; a steady rise makes queries slow.",
            "short",
            [Query("max by (table) (database_dead_tuples)", "{{table}}")],
        ),
        Panel(
            "Is a row past its age limit?",
            "By table and state; docs/ages.md has the limits and whose move it is.",
            "short",
            [Query("max by (table, state) (age_limit_exceeded_rows)", "{{table}}: {{state}}")],
            limit=1,
            alert="AgeLimitExceeded",
        ),
        Panel(
            "What does the janitor delete?",
            "Rows per second whose retention has ended, by table.",
            "ops",
            [Query("sum by (table) (rate(janitor_pruned_total[$__rate_interval]))", "{{table}}")],
        ),
        Panel(
            "Can the janitor not prune a table?",
            "Failed sweeps per second, by table. `orders prune` prints the reason.",
            "ops",
            [Query("sum by (table) (rate(janitor_failures_total[$__rate_interval]))", "{{table}}")],
        ),
        Panel(
            "When was each invariant checked last?",
            "Time since the janitor checked it. It cannot while a partner or the broker is unavailable.",
            "s",
            [Query("time() - max by (invariant) (invariant_checked_timestamp_seconds)", "{{invariant}}")],
            limit=3600,
            alert="InvariantNotChecked",
        ),
        Panel(
            "Does every background loop work?",
            "Time since each last succeeded in any process. Some run once a minute.",
            "s",
            [Query("time() - max by (loop) (max_over_time(loop_last_success_timestamp_seconds[1h]))", "{{loop}}")],
        ),
    ],
)

"""Add what the janitor needs: how often a row was resent, since when it is pending, and earlier vacuums.

Claims and the janitor's scans start at the low end of an index, where the entries of updated rows stay until a vacuum
removes them. By default, a vacuum waits until a fifth of the table is dead, so with every week of history a claim would
step over more dead entries; here it waits for a fixed number. (If so few pages are affected that a vacuum skips the
indexes, the first scan marks the dead entries, and later scans skip them.) The fill factor stays: every update of
outbox and sagas changes an indexed column, so no update could be heap-only.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("outbox", "inbox", "orders", "sagas", "idempotency_keys")
VACUUM = {"autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 20_000}


def upgrade() -> None:
    # Add the columns last: they lock the outbox until the end. The other statements only wait for a running vacuum.
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET ({', '.join(f'{name} = {value}' for name, value in VACUUM.items())})")
    op.execute("ALTER TABLE outbox ADD COLUMN resends integer NOT NULL DEFAULT 0, ADD COLUMN pending_since timestamptz")


def downgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(VACUUM)})")
    op.execute("ALTER TABLE outbox DROP COLUMN pending_since, DROP COLUMN resends")

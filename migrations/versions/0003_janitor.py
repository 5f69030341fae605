"""What the janitor needs: how often a row was sent again and since when, and dead rows cleared away in good time.

Claims, and the janitor's own looks, begin at the low end of an index, where the entries of rows that have moved on lie
until a vacuum takes them away. By default that waits for a fifth of the table to be dead, so with every week of history
a claim would step over more of them; here it is a fixed number. (Where so few pages are concerned that a vacuum spares
the indexes, the first look marks the dead entries, and the next ones skip them.) The fill factor stays: every update of
outbox and sagas moves an indexed column, so none of them could be heap-only, whatever room its page has.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("outbox", "inbox", "orders", "sagas", "idempotency_keys")
VACUUM = {"autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 20_000}


def upgrade() -> None:
    # The columns last: they keep everybody out of the outbox until the end, while the others wait for a vacuum at most.
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET ({', '.join(f'{name} = {value}' for name, value in VACUUM.items())})")
    op.execute("ALTER TABLE outbox ADD COLUMN resends integer NOT NULL DEFAULT 0, ADD COLUMN pending_since timestamptz")


def downgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(VACUUM)})")
    op.execute("ALTER TABLE outbox DROP COLUMN pending_since, DROP COLUMN resends")

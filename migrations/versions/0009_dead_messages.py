"""Index the dead messages of the inbox.

It is a separate migration, because building the index blocks writers of the inbox: it must not be rolled back and
repeated because another statement of the same transaction did not get a lock.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE INDEX IF NOT EXISTS inbox_dead_at_idx ON inbox (consumer, dead_at)
        WHERE dead_at IS NOT NULL AND processed_at IS NULL
        """
    )


def downgrade() -> None:
    op.execute("DROP INDEX inbox_dead_at_idx")

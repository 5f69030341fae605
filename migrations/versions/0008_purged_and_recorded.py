"""Record purges of dead letters, and operator actions without an order or a reason.

`reason` stays NOT NULL, because the previous release reads it as text: no reason is the empty text.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE inbox ADD COLUMN purged_at timestamptz")
    op.execute(
        """
        ALTER TABLE operator_actions
        ALTER COLUMN order_id DROP NOT NULL, ADD COLUMN selection jsonb, ADD COLUMN counts jsonb
        """
    )


def downgrade() -> None:
    op.execute("DELETE FROM operator_actions WHERE order_id IS NULL")
    op.execute(
        """
        ALTER TABLE operator_actions
        ALTER COLUMN order_id SET NOT NULL, DROP COLUMN selection, DROP COLUMN counts
        """
    )
    op.execute("ALTER TABLE inbox DROP COLUMN purged_at")

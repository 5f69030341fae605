"""Add the reason of a cancel, and the audit log of operator actions."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE orders ADD COLUMN cancel_reason text")
    op.execute(
        """
        CREATE TABLE operator_actions (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            at timestamptz NOT NULL DEFAULT clock_timestamp(),
            actor text NOT NULL,
            action text NOT NULL,
            order_id uuid NOT NULL REFERENCES orders (id),
            reason text NOT NULL,
            outcome text NOT NULL
        )
        """
    )
    op.execute("CREATE INDEX operator_actions_order_id_idx ON operator_actions (order_id)")


def downgrade() -> None:
    op.execute("DROP TABLE operator_actions")
    op.execute("ALTER TABLE orders DROP COLUMN cancel_reason")

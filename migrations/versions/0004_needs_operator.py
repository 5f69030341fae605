"""Add the time from which a saga needs an operator."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sagas ADD COLUMN needs_operator_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE sagas DROP COLUMN needs_operator_at")

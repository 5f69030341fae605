"""Add how long stock is held for a saga. It is fixed at the start, because every attempt must send the same value."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sagas ADD COLUMN hold_seconds integer")


def downgrade() -> None:
    op.execute("ALTER TABLE sagas DROP COLUMN hold_seconds")

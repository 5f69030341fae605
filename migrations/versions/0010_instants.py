"""Add the instants that the story of an order needs: starts of calls, the turn to compensation, first publications.

`traced_at` marks a saga whose trace was written after the fact, so that it is written once.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE saga_steps ADD COLUMN started_at timestamptz")
    op.execute("ALTER TABLE sagas ADD COLUMN compensating_at timestamptz, ADD COLUMN traced_at timestamptz")
    op.execute("ALTER TABLE outbox ADD COLUMN first_published_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE outbox DROP COLUMN first_published_at")
    op.execute("ALTER TABLE sagas DROP COLUMN compensating_at, DROP COLUMN traced_at")
    op.execute("ALTER TABLE saga_steps DROP COLUMN started_at")

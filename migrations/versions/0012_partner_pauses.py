"""Add the pauses of partners.

A row is one pause, kept for good: the timeline of an order shows those that it lived through. Older releases neither
read nor write the table, and so do not obey a pause.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE partner_pauses (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            partner text NOT NULL,
            paused_at timestamptz NOT NULL,
            ends_at timestamptz NOT NULL,
            ended_at timestamptz,
            actor text NOT NULL,
            reason text NOT NULL
        )
        """
    )
    op.execute("CREATE INDEX partner_pauses_ends_at_idx ON partner_pauses (ends_at)")


def downgrade() -> None:
    op.execute("DROP TABLE partner_pauses")

"""Add the transport leases: one row per running relay or consumer process, valid until its lease ends."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE transport_leases (
            id uuid PRIMARY KEY,
            transport text NOT NULL,
            holder text NOT NULL,
            expires_at timestamptz NOT NULL
        )
        """
    )


def downgrade() -> None:
    op.execute("DROP TABLE transport_leases")

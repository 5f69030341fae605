"""Add the request to cancel an order, and keyset indexes for listings."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE orders ADD COLUMN cancel_requested_at timestamptz")
    op.execute("CREATE INDEX orders_tenant_placed_at_id_idx ON orders (tenant, placed_at, id)")
    op.execute(
        "CREATE INDEX orders_tenant_customer_id_placed_at_id_idx ON orders (tenant, customer_id, placed_at, id)"
        " WHERE customer_id IS NOT NULL"
    )
    op.execute(
        "CREATE INDEX orders_status_tenant_placed_at_id_idx ON orders (status, tenant, placed_at, id)"
        " WHERE status <> 'confirmed'"
    )


def downgrade() -> None:
    op.execute("DROP INDEX orders_status_tenant_placed_at_id_idx")
    op.execute("DROP INDEX orders_tenant_customer_id_placed_at_id_idx")
    op.execute("DROP INDEX orders_tenant_placed_at_id_idx")
    op.execute("ALTER TABLE orders DROP COLUMN cancel_requested_at")

"""Index the ids by which operators search for orders: tracking, payment and trace id.

Each is a hash index. Operators search for one id, never for a range, and an entry of a hash index has 4 bytes of hash
instead of the id. Each is partial: an order is in the first once it is confirmed, in the second once it is charged, and
in the third only if its request had a trace.

The indexes are built concurrently, because the tables may be large, and orders must be accepted meanwhile. So nothing
is rolled back when a build fails: each build first drops what an earlier one left. A build waits for transactions that
are older, which delays no other session; so it waits longer than other migrations do.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

INDEXES = {
    "orders_tracking_id_idx": "orders USING hash (tracking_id) WHERE tracking_id IS NOT NULL",
    "saga_steps_payment_id_idx": "saga_steps USING hash ((reply ->> 'payment_id'))"
    " WHERE (reply ->> 'payment_id') IS NOT NULL",
    "sagas_trace_id_idx": "sagas USING hash (substr(traceparent, 4, 32)) WHERE traceparent IS NOT NULL",
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = '60s'")
        for name, definition in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {definition}")
        op.execute("SET lock_timeout = '2s'")


def downgrade() -> None:
    for name in reversed(INDEXES):
        op.execute(f"DROP INDEX {name}")

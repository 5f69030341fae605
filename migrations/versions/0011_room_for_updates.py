"""Leave room in the pages of sagas for new versions of their rows.

The writes of a running saga between two calls change no indexed column. If the page has room, such an update is
heap-only: no index gets an entry that a claim has to step over later.
Only new pages are affected; the tables are not rewritten. Outbox and idempotency keys keep their fill factor: each
update of them changes an indexed column, or the condition of a partial index.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sagas SET (fillfactor = 70)")


def downgrade() -> None:
    op.execute("ALTER TABLE sagas RESET (fillfactor)")

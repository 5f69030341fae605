"""What an operator may do to an outbox row: let a parked one be published again. It is recorded."""

from uuid import UUID

from app import db
from app.errors import ParkedRowNotFound
from app.messaging import outbox_admin
from app.operations import audit
from app.operations.audit import Operator
from app.operations.dead_letters import as_uuid

ACTION = "outbox requeue"
PENDING = "pending"  # the outcome: the relay takes it at its next look


async def requeue(pool: db.Pool, row_id: UUID, operator: Operator) -> None:
    """Let a parked row be published again, with all its attempts. Raises ParkedRowNotFound."""
    async with db.transaction(pool) as conn:
        subjects = await outbox_admin.requeue(conn, [row_id])
        if not subjects:
            raise ParkedRowNotFound(f"no parked outbox row has the id {row_id}")
        await audit.record(conn, operator, ACTION, as_uuid(subjects[0]), PENDING, {"id": str(row_id)})

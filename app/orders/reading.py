"""What is read of orders, beyond one order by its id: which of them have ended."""

from collections.abc import Sequence
from uuid import UUID

from app import db
from app.orders.status import FINAL


async def ended(conn: db.Connection, ids: Sequence[UUID]) -> list[UUID]:
    """Return which of these orders have a final status."""
    rows = await conn.fetch("SELECT id FROM orders WHERE id = ANY($1) AND status = ANY($2)", ids, sorted(FINAL))
    return [UUID(int=row["id"].int) for row in rows]

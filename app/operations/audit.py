"""What operators did, and why: rows that are only ever added, each in the transaction of what it tells of."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, ForeignKey, Identity, Index, Table, Text, func

from app import db

operator_actions = Table(
    "operator_actions",
    db.metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("order_id", ForeignKey("orders.id"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Index("operator_actions_order_id_idx", "order_id"),
)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts, and why.

    `actor`: a token's subject; `admin-token`; `cli:` and the name of the operating system's user.
    """

    actor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Acted:
    """One row. `outcome`: what came of it, or what it found."""

    at: datetime
    actor: str
    action: str
    reason: str
    outcome: str


async def record(conn: db.Connection, operator: Operator, action: str, order_id: UUID, outcome: str) -> None:
    """Add a row, in the caller's transaction. The caller has locked the order."""
    await conn.execute(
        "INSERT INTO operator_actions (actor, action, order_id, reason, outcome) VALUES ($1, $2, $3, $4, $5)",
        operator.actor,
        action,
        order_id,
        operator.reason,
        outcome,
    )


async def of_order(conn: db.Connection, order_id: UUID) -> list[Acted]:
    """Return what operators did to an order, in order."""
    rows = await conn.fetch(
        "SELECT at, actor, action, reason, outcome FROM operator_actions WHERE order_id = $1 ORDER BY id", order_id
    )
    return [Acted(**row) for row in rows]

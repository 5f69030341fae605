"""The audit log: what operators did, and why.

A row is written in the same transaction as the change. A command with many steps writes its row before the first step
and completes it after the last; the row of a killed command stays UNFINISHED.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, ForeignKey, Identity, Index, Table, Text, func
from sqlalchemy.dialects.postgresql import JSONB

from app import db
from app.errors import DatabaseUnavailable, OrdersError
from app.values import immutable

operator_actions = Table(
    "operator_actions",
    db.metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("order_id", ForeignKey("orders.id")),  # NULL: not about one order
    Column("reason", Text, nullable=False),  # empty: none was given
    Column("outcome", Text, nullable=False),
    Column("selection", JSONB),  # what the operator selected
    Column("counts", JSONB),  # what the command counted
    Index("operator_actions_order_id_idx", "order_id"),
)

UNFINISHED = "unfinished"
DONE = "done"
NOTHING_MATCHED = "nothing-matched"
FAILED = "failed: "  # how the outcome of a command that failed begins


@immutable
class AuditActor:
    """Who acts, and why. An empty reason: none was given.

    `name`: a token's subject; `admin-token`; `cli:` and the name of the operating system's user.
    """

    name: str
    reason: str = ""


@dataclass
class CommandRecord:
    """What the row of a command with many steps gets at its end. `counts`: what the command counted, by name."""

    outcome: str = DONE
    counts: dict[str, int] = field(default_factory=dict)


@immutable
class OperatorAction:
    """One row. `outcome`: what the action did, or why it changed nothing."""

    at: datetime
    actor: str
    action: str
    reason: str
    outcome: str


@immutable
class ActionFilter:
    """Selects rows. None: no condition.

    `order_id`: the order that the action, or the message that it was about, belongs to. `since_seconds`: before now, on
    Postgres's clock. `before`: the id of a newer row. `actor`, `action`: exactly these.
    """

    order_id: UUID | None = None
    since_seconds: float | None = None
    before: int | None = None
    actor: str | None = None
    action: str | None = None


@immutable
class ActionRow:
    """A row with everything that it records."""

    id: int
    at: datetime
    actor: str
    action: str
    order_id: UUID | None
    reason: str
    outcome: str
    selection: Mapping[str, Any] | None
    counts: Mapping[str, Any] | None


async def record(
    conn: db.Connection,
    actor: AuditActor,
    action: str,
    order_id: UUID | None,
    outcome: str,
    selection: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> int:
    """Add a row in the caller's transaction. Leaves its order empty if no order has this id. Returns the row's id."""
    row_id: int = await conn.fetchval(
        """
        INSERT INTO operator_actions (actor, action, order_id, reason, outcome, selection, counts)
        VALUES ($1, $2, (SELECT id FROM orders WHERE id = $3), $4, $5, $6, $7) RETURNING id
        """,
        actor.name,
        action,
        order_id,
        actor.reason,
        outcome,
        *(None if found is None else json.dumps(found) for found in (selection, counts)),
    )
    return row_id


@contextlib.asynccontextmanager
async def on_record(
    pool: db.Pool, actor: AuditActor, action: str, order_id: UUID | None, selection: Mapping[str, Any]
) -> AsyncIterator[CommandRecord]:
    """Commit a row before the block runs, and complete it afterwards with the outcome and the counts of the block.

    If the block raises or is cancelled, the outcome is `failed` with the counts so far. Raises DatabaseUnavailable.
    """
    command = CommandRecord()
    async with db.connection(pool) as conn:
        row_id = await record(conn, actor, action, order_id, UNFINISHED, selection)
    try:
        yield command
    except BaseException as error:
        reason = error.code if isinstance(error, OrdersError) else type(error).__name__
        with contextlib.suppress(DatabaseUnavailable):  # the caller needs the error of the block, not this one
            await asyncio.shield(_complete(pool, row_id, f"{FAILED}{reason}", command.counts))
        raise
    await _complete(pool, row_id, command.outcome, command.counts)


async def _complete(pool: db.Pool, row_id: int, outcome: str, counts: Mapping[str, int]) -> None:
    async with db.connection(pool) as conn:
        await conn.execute(
            "UPDATE operator_actions SET outcome = $2, counts = $3 WHERE id = $1", row_id, outcome, json.dumps(counts)
        )


async def of_order(conn: db.Connection, order_id: UUID) -> list[OperatorAction]:
    """Return what operators did to an order, in order."""
    rows = await conn.fetch(
        "SELECT at, actor, action, reason, outcome FROM operator_actions WHERE order_id = $1 ORDER BY id", order_id
    )
    return [OperatorAction(**row) for row in rows]


async def list_newest(conn: db.Connection, wanted: ActionFilter, limit: int) -> list[ActionRow]:
    """Return up to `limit` rows, newest first. An age is a number: a very long interval would be out of range."""
    rows = await conn.fetch(
        """
        SELECT id, at, actor, action, order_id, reason, outcome, selection, counts FROM operator_actions
        WHERE ($1::uuid IS NULL OR order_id = $1)
          AND ($2::float8 IS NULL OR extract(epoch FROM (SELECT clock_timestamp()) - at) <= $2)
          AND ($3::bigint IS NULL OR id < $3)
          AND ($4::text IS NULL OR actor = $4)
          AND ($5::text IS NULL OR action = $5)
        ORDER BY id DESC LIMIT $6
        """,
        wanted.order_id,
        wanted.since_seconds,
        wanted.before,
        wanted.actor,
        wanted.action,
        limit,
    )
    return [_parse_action(row) for row in rows]


def _parse_action(row: Any) -> ActionRow:
    found = {name: None if row[name] is None else json.loads(row[name]) for name in ("selection", "counts")}
    order_id = None if row["order_id"] is None else UUID(int=row["order_id"].int)
    return ActionRow(**{**row, **found, "order_id": order_id})

"""Operators that act without HTTP and without a command line."""

from typing import Any
from uuid import UUID

from app.db import Pool
from app.operations import partners, sagas
from app.operations.audit import AuditActor
from app.operations.sagas import ActionOutcome

OPERATOR = AuditActor("cli:ada", "the warehouse burns")


async def compensate(pool: Pool, order_id: UUID) -> ActionOutcome:
    """Make a saga compensate."""
    return await sagas.compensate(pool, order_id, OPERATOR, {})


async def retry(pool: Pool, order_id: UUID) -> ActionOutcome:
    """End a saga's pause."""
    return await sagas.retry(pool, order_id, OPERATOR)


async def pause_partner(pool: Pool, partner: str, seconds: float = 3600) -> None:
    """Pause calls to a partner."""
    await partners.pause(pool, partner, seconds, OPERATOR)


async def resume_partner(pool: Pool, partner: str) -> None:
    """Resume calls to a partner."""
    await partners.resume(pool, partner, OPERATOR)


async def audit_rows(pool: Pool) -> list[tuple[Any, ...]]:
    """Return the records: actor, action, order, reason, outcome."""
    rows = await pool.fetch("SELECT actor, action, order_id, reason, outcome FROM operator_actions ORDER BY id")
    return [tuple(row) for row in rows]


async def recorded(pool: Pool) -> list[str]:
    """Return the records in short: `retry due`."""
    return [f"{action} {outcome}" for _, action, _, _, outcome in await audit_rows(pool)]

"""Queries for operators: the unfinished sagas, and one saga with its log."""

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from app import db
from app.values import immutable

GRACE_SECONDS = 60.0  # after its deadline or its due time, a saga counts as stuck
MAX_STEPS = 1000  # the most log entries read for one saga: an undo may have been retried for weeks

# Stuck sagas come first in a listing; a listing of `stuck` sagas has no others.
STUCK = f"""(
    least(s.deadline_at, s.next_attempt_at) < clock_timestamp() - interval '{GRACE_SECONDS:g} s'
    OR coalesce(s.needs_operator_at <= clock_timestamp(), false)
)"""

COLUMNS = f"""
    s.id, o.tenant, o.status, s.direction, s.step, s.attempts, coalesce(s.reason, o.cancel_reason) AS reason,
    s.lease_owner, s.started_at, s.deadline_at, s.next_attempt_at, s.finished_at,
    {STUCK} AND s.finished_at IS NULL AS stuck,
    extract(epoch FROM coalesce(s.finished_at, clock_timestamp()) - s.started_at)::float8 AS age_seconds,
    extract(epoch FROM s.next_attempt_at - clock_timestamp())::float8 AS next_attempt_in_seconds
"""


@immutable
class SagaRow:
    """A saga as it is now.

    `next_attempt_in_seconds`: until it is due, or until the lease of `lease_owner` ends; negative once that has passed.
    `reason`: why it compensates, or is about to. `stuck`: it needs an operator, or has been late or due for more than
    `GRACE_SECONDS`.
    """

    id: UUID
    tenant: str
    status: str
    direction: str
    step: str | None
    attempts: int
    reason: str | None
    lease_owner: str | None
    started_at: datetime
    deadline_at: datetime
    next_attempt_at: datetime
    finished_at: datetime | None
    stuck: bool
    age_seconds: float
    next_attempt_in_seconds: float


@immutable
class UnfinishedSaga:
    """A saga in a listing. `outcome` and `detail` are those of its last call, or None before its first call."""

    saga: SagaRow
    outcome: str | None
    detail: str | None


@immutable
class StepLogRow:
    """A row of a saga's log. `outcome`: attempted (before the call), done, refused, not-sent or unknown."""

    at: datetime
    step: str
    action: str
    attempt: int
    outcome: str
    detail: str | None
    reply: Mapping[str, Any] | None


async def list_unfinished(conn: db.Connection, limit: int, status: str | None, *, stuck: bool) -> list[UnfinishedSaga]:
    """Return up to `limit` unfinished sagas: the stuck ones first, and the oldest first within each group.

    `status` selects by the status of their orders. Only the logs of the returned sagas are read.
    """
    rows = await conn.fetch(
        f"""
        WITH listed AS MATERIALIZED (
            SELECT {COLUMNS} FROM sagas s JOIN orders o USING (id)
            WHERE s.finished_at IS NULL AND ($1::text IS NULL OR o.status = $1) AND ({STUCK} OR NOT $2)
            ORDER BY {STUCK} DESC, s.started_at, s.id LIMIT $3
        )
        SELECT listed.*, answer.outcome, answer.detail FROM listed LEFT JOIN LATERAL (
            SELECT outcome, detail FROM saga_steps
            WHERE saga_id = listed.id AND outcome <> 'attempted' ORDER BY id DESC LIMIT 1
        ) AS answer ON true
        ORDER BY listed.stuck DESC, listed.started_at, listed.id
        """,  # noqa: S608 - constants
        status,
        stuck,
        limit,
    )
    return [UnfinishedSaga(_parse_saga(row), row["outcome"], row["detail"]) for row in rows]


async def find(conn: db.Connection, saga_id: UUID) -> SagaRow | None:
    """Return one saga, unfinished or not; None if it never started or was removed after its retention."""
    row = await conn.fetchrow(
        f"SELECT {COLUMNS} FROM sagas s JOIN orders o USING (id) WHERE s.id = $1",  # noqa: S608 - constants
        saga_id,
    )
    return None if row is None else _parse_saga(row)


async def read_log(conn: db.Connection, saga_id: UUID) -> list[StepLogRow]:
    """Return the last `MAX_STEPS` rows of a saga's log, in order."""
    rows = await conn.fetch(
        f"""
        SELECT at, step, action, attempt, outcome, detail, reply FROM saga_steps
        WHERE saga_id = $1 ORDER BY id DESC LIMIT {MAX_STEPS:d}
        """,  # noqa: S608 - a number
        saga_id,
    )
    lines = [{**row, "reply": None if row["reply"] is None else json.loads(row["reply"])} for row in rows]
    return [StepLogRow(**line) for line in reversed(lines)]


async def read_partner_ids(conn: db.Connection, saga_id: UUID) -> dict[str, str]:
    """Return the ids that partners gave, by their names in the replies, such as `payment_id`."""
    rows = await conn.fetch(
        """
        SELECT DISTINCT key, value FROM saga_steps CROSS JOIN LATERAL jsonb_each_text(reply)
        WHERE saga_id = $1 AND action = 'do' AND outcome = 'done' AND key LIKE '%\\_id' ORDER BY key
        """,
        saga_id,
    )
    return {row["key"]: row["value"] for row in rows}


def _parse_saga(row: Any) -> SagaRow:
    values = {field.name: row[field.name] for field in fields(SagaRow)}
    return SagaRow(**values | {"id": UUID(int=row["id"].int)})


class Stats(NamedTuple):
    """Unfinished sagas: how many by their order's status, the age of the oldest, how many need an operator."""

    in_flight: dict[str, int]
    oldest_age_seconds: float
    needs_operator: int


async def measure(conn: db.Connection) -> Stats:
    """Measure the unfinished sagas."""
    rows = await conn.fetch(
        """
        SELECT o.status, count(*) AS unfinished,
               extract(epoch FROM clock_timestamp() - min(s.started_at))::float8 AS age,
               count(*) FILTER (WHERE s.needs_operator_at <= clock_timestamp()) AS needs_operator
        FROM sagas s JOIN orders o USING (id) WHERE s.finished_at IS NULL GROUP BY o.status
        """
    )
    return Stats(
        {row["status"]: row["unfinished"] for row in rows},
        max((row["age"] for row in rows), default=0.0),
        sum(row["needs_operator"] for row in rows),
    )


async def find_unstarted(conn: db.Connection, order_ids: Collection[UUID]) -> set[UUID]:
    """Return which of these orders are pending and have no saga: their `order.placed` has not been handled."""
    rows = await conn.fetch(
        """
        SELECT id FROM orders
        WHERE id = ANY($1::uuid[]) AND status = 'pending'
          AND NOT EXISTS (SELECT FROM sagas WHERE sagas.id = orders.id)
        """,
        list(order_ids),
    )
    return {UUID(int=row["id"].int) for row in rows}

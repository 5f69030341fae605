"""The saga tables: one row per saga, and the append-only log of attempts and outcomes.

From `next_attempt_at` on, any process may claim the saga. A claim moves that time to the end of the lease, and so does
a write of its runner when less than two thirds of the lease remain. `version` is the fencing token: every claim and
every write increments it, and a write with an older version changes nothing.

`needs_operator_at` is the time from which an operator must look at the saga: by then its current call has failed for
too long, or it got an answer that retrying cannot fix. The next call clears it. A wait for the end of an operator's
pause clears it too, unless that time has come before. It is only shown; no code acts on it.

`compensating_at` is the time from which the saga undoes. `traced_at` is the time at which its trace was written after
the fact; NULL: it was not. In the log, `started_at` is the start of the call whose outcome the row records.

`deadline_at` and `hold_seconds` are fixed when the saga starts, even if the settings change later: every attempt to
hold stock must ask for the same time, and for longer than the saga may take. `hold_seconds` is NULL in sagas that an
older release started.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app import db
from app.claim_hint import START
from app.observability.traces import derive_span_id
from app.orders.model import Reason
from app.orders.store import DEFAULT_CANCEL_REASON
from app.saga import plan
from app.saga.steps import Action
from app.values import immutable

sagas = Table(
    "sagas",
    db.metadata,
    Column("id", ForeignKey("orders.id"), primary_key=True),
    Column("plan_version", SmallInteger, nullable=False),
    Column(
        "direction",
        Text,
        CheckConstraint("direction IN ('forward', 'backward')", name="direction"),
        nullable=False,
    ),
    Column("step", Text),
    Column("attempts", Integer, nullable=False),
    Column("reason", Text),
    Column("version", Integer, nullable=False),
    Column("next_attempt_at", DateTime(timezone=True), nullable=False),
    Column("lease_owner", Text),
    Column("deadline_at", DateTime(timezone=True), nullable=False),
    Column("traceparent", Text),
    Column("tracestate", Text),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("finished_at", DateTime(timezone=True)),
    Column("needs_operator_at", DateTime(timezone=True)),
    Column("hold_seconds", Integer),
    Column("compensating_at", DateTime(timezone=True)),
    Column("traced_at", DateTime(timezone=True)),
    Index("sagas_next_attempt_at_idx", "next_attempt_at", postgresql_where=text("finished_at IS NULL")),
    Index(
        "sagas_trace_id_idx",
        text("substr(traceparent, 4, 32)"),  # W3C Trace Context, section 3.2
        postgresql_using="hash",
        postgresql_where=text("traceparent IS NOT NULL"),
    ),
)

saga_steps = Table(
    "saga_steps",
    db.metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("saga_id", ForeignKey("sagas.id"), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("step", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("detail", Text),
    Column("reply", JSONB),
    Column("started_at", DateTime(timezone=True)),
    Index("saga_steps_saga_id_idx", "saga_id"),
    Index(
        "saga_steps_payment_id_idx",
        text("(reply ->> 'payment_id')"),
        postgresql_using="hash",
        postgresql_where=text("(reply ->> 'payment_id') IS NOT NULL"),
    ),
)


HOLD_MARGIN_SECONDS = 300  # covers the last call before the deadline, and differences between clocks


Claim = tuple[UUID, int]  # a saga, and its version as its runner knows it: a batch may have two runners of one saga


@immutable
class Saga:
    """A saga whose lease this process holds."""

    id: UUID
    version: int
    state: plan.SagaState
    due_at: datetime  # from when it could be claimed
    remaining_seconds: float  # from the claim to the deadline
    started_at: datetime
    hold_seconds: int
    traceparent: str | None
    tracestate: str | None
    needs_operator: bool = False  # as of its last write
    age_seconds: float = 0.0  # as of its last write
    cancelled: Reason | None = None  # why it must compensate, as of its last write

    @property
    def claim(self) -> Claim:
        """What tells this runner from one that has lost the saga's lease, or has claimed it since."""
        return self.id, self.version

    @property
    def must_compensate(self) -> bool:
        """Return whether the saga was cancelled and still goes forward."""
        return self.cancelled is not None and self.state.direction is plan.SagaDirection.FORWARD

    @property
    def is_sampled(self) -> bool:
        """Return whether the trace of the order's request is exported."""
        return (self.traceparent or "").endswith("1")

    @property
    def trace(self) -> dict[str, str]:
        """Return the trace context of the order's request, as headers."""
        headers = {"traceparent": self.traceparent, "tracestate": self.tracestate}
        return {name: value for name, value in headers.items() if value}


def late_span_id(saga_id: UUID) -> int:
    """Return the id of the saga's span in a trace that is written after the fact."""
    return derive_span_id("saga", saga_id)


@immutable
class StepLogEntry:
    """One entry of the log. `outcome`: attempted (before the call), done, refused, not-sent or unknown.

    `started`: on `time.monotonic`, when the call of this outcome started.
    """

    step: str
    action: Action
    attempt: int
    outcome: str
    detail: str | None = None
    reply: Mapping[str, Any] | None = None
    started: float | None = None


async def claim(
    conn: db.Connection,
    owner: str,
    plan_versions: Collection[int],
    limit: int,
    lease_seconds: float,
    since: datetime = START,
) -> list[Saga]:
    """Claim up to `limit` due sagas of these plan versions for `lease_seconds`, the longest due first.

    Sagas that became due before `since` are left to a later claim; see `ClaimHint`.

    MATERIALIZED keeps the limit: the planner may run a subquery of IN once per row, and lock more rows each time.
    `clock_timestamp()` is volatile; in a subselect it is evaluated once, so the index can be used. Otherwise every
    claim would read all waiting sagas.
    """
    rows = await conn.fetch(
        """
        WITH due AS MATERIALIZED (
            SELECT id, next_attempt_at FROM sagas
            WHERE finished_at IS NULL AND next_attempt_at >= $6 AND next_attempt_at <= (SELECT clock_timestamp())
              AND plan_version = ANY($2)
            ORDER BY next_attempt_at
            LIMIT $3
            FOR UPDATE SKIP LOCKED
        )
        UPDATE sagas
        SET lease_owner = $1, version = version + 1,
            next_attempt_at = clock_timestamp() + make_interval(secs => $4)
        FROM due WHERE sagas.id = due.id
        RETURNING sagas.id, version, plan_version, direction, step, attempts, reason, started_at,
                  coalesce(hold_seconds, ceil(extract(epoch FROM deadline_at - started_at)) + $5)::int AS hold_seconds,
                  extract(epoch FROM deadline_at - clock_timestamp())::float8 AS remaining_seconds,
                  coalesce(needs_operator_at <= updated_at, false) AS needs_operator,
                  traceparent, tracestate, due.next_attempt_at AS due_at
        """,
        owner,
        list(plan_versions),
        limit,
        lease_seconds,
        HOLD_MARGIN_SECONDS,
        since,
    )
    return [_parse_saga(row) for row in rows]


@immutable
class SagaWrite:
    """The next state of a saga, the log entries that lead to it, and what becomes of its lease.

    With an `owner`, the lease is renewed until `due_in_seconds` from now, unless two thirds of that remain: a call
    takes at most one third. So most writes between two calls change no indexed column: Postgres leaves the indexes
    alone, and claims have fewer dead entries to step over. Without an owner, the lease ends and the saga is due at that
    time. `operator_in_seconds`: the current call must wait, and needs an operator after this many seconds, unless an
    earlier time is already recorded. `paused`: the call waits for the end of an operator's pause.
    """

    saga: Saga
    state: plan.SagaState
    entries: Sequence[StepLogEntry]
    due_in_seconds: float
    owner: str | None
    operator_in_seconds: float | None = None
    paused: bool = False

    @property
    def claim(self) -> Claim:
        """The claim of its runner."""
        return self.saga.claim


SAVE = """
    WITH given AS (
        SELECT given.*, now.at, now.at + make_interval(secs => given.due_seconds) AS due_at
        FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::integer[], $6::text[], $7::text[],
                    $8::float8[], $9::float8[], $20::boolean[])
            AS given (id, version, direction, step, attempts, reason, owner, due_seconds, operator_seconds, paused),
            (SELECT clock_timestamp() AS at) AS now,
            -- of this statement's own transaction, or of the caller's; it precedes the first lock, as the rows do
            (SELECT set_config('lock_timeout', coalesce($19, current_setting('lock_timeout')), true)) AS bound
    ), saved AS (
        UPDATE sagas
        SET direction = given.direction, step = given.step, attempts = given.attempts, reason = given.reason,
            version = sagas.version + 1, lease_owner = given.owner,
            next_attempt_at = CASE
                WHEN lease_owner = given.owner AND next_attempt_at BETWEEN
                    given.due_at - make_interval(secs => given.due_seconds / 3) AND given.due_at
                THEN next_attempt_at ELSE given.due_at END,
            updated_at = given.at, finished_at = CASE WHEN given.step IS NULL THEN given.at END,
            needs_operator_at = least(
                CASE WHEN sagas.direction = given.direction AND sagas.step = given.step
                    AND (needs_operator_at <= given.at OR NOT given.paused) THEN needs_operator_at END,
                given.at + make_interval(secs => given.operator_seconds)),
            compensating_at = CASE
                WHEN sagas.direction <> given.direction AND given.direction = 'backward' THEN given.at
                ELSE compensating_at END
        FROM given
        WHERE sagas.id = given.id AND sagas.version = given.version
        RETURNING sagas.id, sagas.version, coalesce(needs_operator_at <= given.at, false) AS needs_operator,
                  extract(epoch FROM given.at - started_at)::float8 AS age_seconds
    ), logged AS (
        INSERT INTO saga_steps (saga_id, step, action, attempt, outcome, detail, reply, started_at)
        SELECT saved.id, entry.step, entry.action, entry.attempt, entry.outcome, left(entry.detail, 500),
               entry.reply, clock_timestamp() - make_interval(secs => entry.seconds)
        FROM saved
        JOIN unnest($10::uuid[], $11::text[], $12::text[], $13::integer[], $14::text[], $15::text[], $16::jsonb[],
                    $17::float8[], $18::integer[])
            WITH ORDINALITY AS entry (saga_id, step, action, attempt, outcome, detail, reply, seconds, version, number)
            ON entry.saga_id = saved.id AND entry.version = saved.version - 1
        ORDER BY entry.number
    )
    SELECT saved.id, saved.version, saved.needs_operator, saved.age_seconds,
           orders.cancel_requested_at IS NOT NULL AS cancelled, orders.cancel_reason
    FROM saved JOIN orders USING (id)
"""


async def save(
    conn: db.Connection, writes: Sequence[SagaWrite], lock_seconds: float | None = None
) -> dict[Claim, Saga]:
    """Write new states and append to the log, in one statement. Return, by claim, the sagas that were written.

    A saga that was claimed again, by another process or by this one, is not written, and neither are its log entries.
    With `lock_seconds`, waiting longer than that for a saga's lock raises asyncpg.LockNotAvailableError (55P03).

    The statement also returns whether each order was cancelled when the statement started. A caller that must know for
    certain locks the order first.
    """
    logged = [(write, entry) for write in writes for entry in write.entries]
    rows = await conn.fetch(
        SAVE,
        [write.saga.id for write in writes],
        [write.saga.version for write in writes],
        [write.state.direction for write in writes],
        [write.state.step for write in writes],
        [write.state.attempts for write in writes],
        [write.state.reason for write in writes],
        [write.owner for write in writes],
        [write.due_in_seconds for write in writes],
        [write.operator_in_seconds for write in writes],
        [write.saga.id for write, _ in logged],
        [entry.step for _, entry in logged],
        [entry.action for _, entry in logged],
        [entry.attempt for _, entry in logged],
        [entry.outcome for _, entry in logged],
        [entry.detail for _, entry in logged],
        [None if entry.reply is None else json.dumps(dict(entry.reply)) for _, entry in logged],
        [None if entry.started is None else time.monotonic() - entry.started for _, entry in logged],
        [write.saga.version for write, _ in logged],
        None if lock_seconds is None else f"{max(1, round(lock_seconds * 1000))}ms",
        [write.paused for write in writes],
    )
    written = {(UUID(int=row["id"].int), row["version"] - 1): row for row in rows}
    return {write.claim: _written(write, written[write.claim]) for write in writes if write.claim in written}


def _written(write: SagaWrite, row: asyncpg.Record) -> Saga:
    cancelled = Reason(row["cancel_reason"] or DEFAULT_CANCEL_REASON) if row["cancelled"] else None
    found = {name: row[name] for name in ("version", "needs_operator", "age_seconds")}
    return replace(write.saga, state=write.state, cancelled=cancelled, **found)


async def find_claims(conn: db.Connection, saga_ids: Collection[UUID]) -> set[Claim]:
    """Return the present claims of these sagas."""
    rows = await conn.fetch("SELECT id, version FROM sagas WHERE id = ANY($1)", list(saga_ids))
    return {(UUID(int=row["id"].int), row["version"]) for row in rows}


async def read_do_reply(conn: db.Connection, saga_id: UUID, step: str) -> Mapping[str, Any] | None:
    """Return the partner's recorded reply to the step's do; None if no reply was ever recorded."""
    query = """
        SELECT reply FROM saga_steps WHERE saga_id = $1 AND step = $2 AND action = $3 AND outcome = 'done' LIMIT 1
    """
    reply: str | None = await conn.fetchval(query, saga_id, step, Action.DO)
    return None if reply is None else json.loads(reply)


async def read_traceparent(conn: db.Connection, saga_id: UUID) -> str | None:
    """Return the trace context of the saga; None if it has none, or there is no saga."""
    found: str | None = await conn.fetchval("SELECT traceparent FROM sagas WHERE id = $1", saga_id)
    return found


async def wake_if_waiting(conn: db.Connection, saga_id: UUID) -> bool:
    """Make a waiting saga due now. Return false if the order has no saga. The caller has locked the order.

    A running saga is not touched: its runner sees the cancel with its next write.
    """
    query = """
        UPDATE sagas
        SET next_attempt_at = CASE WHEN lease_owner IS NULL THEN clock_timestamp() ELSE next_attempt_at END
        WHERE id = $1 RETURNING true
    """
    return await conn.fetchval(query, saga_id) is True


async def make_due(conn: db.Connection, saga_id: UUID) -> bool:
    """Make a waiting saga due now. The caller has locked the order.

    Return false if the saga has ended, is running, is already due, or does not exist.
    """
    query = """
        UPDATE sagas SET next_attempt_at = clock_timestamp()
        WHERE id = $1 AND finished_at IS NULL AND lease_owner IS NULL AND next_attempt_at > clock_timestamp()
        RETURNING true
    """
    return await conn.fetchval(query, saga_id) is True


def _parse_saga(row: Any) -> Saga:
    state = plan.SagaState(
        plan_version=row["plan_version"],
        direction=plan.SagaDirection(row["direction"]),
        step=row["step"],
        attempts=row["attempts"],
        reason=Reason(row["reason"]) if row["reason"] else None,
    )
    return Saga(
        id=UUID(int=row["id"].int),
        version=row["version"],
        state=state,
        due_at=row["due_at"],
        remaining_seconds=row["remaining_seconds"],
        started_at=row["started_at"],
        hold_seconds=row["hold_seconds"],
        traceparent=row["traceparent"],
        tracestate=row["tracestate"],
        needs_operator=row["needs_operator"],
    )

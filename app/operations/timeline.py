"""The story of an order, from the rows that already record it: request, outbox, inbox, saga, operators, end.

Everything is read in one snapshot. An entry never changes: the start of a call and its outcome are two entries, and
what a row may lose again (that an event is parked, that a message is dead) is no entry but a part of `why_stuck`.
Entries disappear with their rows: when retention removes these, and in a log of more than MAX_STEPS rows.

A `Position` says which entries a reader has seen. Rows may become visible late, so it is not a time: it has the last id
of the saga's log, which only grows, and the names of the other entries, which are few.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Self
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.errors import OrderNotFound
from app.operations import audit, why_stuck
from app.operations.why_stuck import Situation, WhyStuck
from app.orders.model import FINAL, Reason, Status, rfc3339
from app.partners.ports import Done
from app.saga import plan
from app.saga.plan import Call, SagaDirection, SagaState
from app.saga.steps import PLANS, Action
from app.values import immutable

END = "end"  # the entry of the final status
PLANNED = "planned"
MAX_STEPS = 1000  # the newest entries of the log; an undo may have been retried for weeks
# Each part can match in one way only: with several, a hostile header would take exponential time.
POSITION = re.compile(r"([0-9]{1,18})((?:\.[a-z]{1,9}(?:-[0-9]{1,18})?)*)")

# No index leads from an order to its published events. `order.placed` has the order's id; the id of the last event is a
# UUIDv7 of the time at which the order ended, so it is looked for among the events of those seconds. An order that has
# not ended has no such event: its streams, which read often, skip this search.
LAST_EVENT_SECONDS = (-1, 5)
MAX_EVENTS = 20_000  # of those seconds; without a limit, the planner would read a large table from end to end
ENDED = ", ".join(f"'{status}'" for status in sorted(FINAL))


def _first_id(seconds: int) -> str:
    """Return the SQL for the lowest UUIDv7 of `updated_at` plus `seconds` (RFC 9562, section 5.7)."""
    milliseconds = f"((extract(epoch FROM updated_at) + {seconds:d}) * 1000)::bigint"
    return f"(lpad(to_hex({milliseconds}), 12, '0') || repeat('0', 20))::uuid"


# `name` is unique within an order, except in the log, where `number` identifies a row. Causes come before effects
# of the same instant: `rank`. The log keeps its own order even if Postgres's clock was set back: otherwise a position
# could skip a row. The last `do` is looked up in the whole table: the start of the compensation must not change when
# that row has left the `log`. `pauses` are those of partners that the order lived through; only operators read their
# reasons. Parameters: the order, its tenant (NULL: any, for an operator), the inbox name of the saga's consumer.
STORY = f"""
WITH this AS (SELECT * FROM orders WHERE id = $1 AND ($2::text IS NULL OR tenant = $2)),
     events AS (
         SELECT * FROM outbox WHERE id = (SELECT id FROM this)
         UNION
         SELECT * FROM outbox WHERE subject = (SELECT id::text FROM this) AND published_at IS NULL
         UNION
         SELECT near.* FROM this CROSS JOIN LATERAL (
             SELECT * FROM outbox
             WHERE id BETWEEN {_first_id(LAST_EVENT_SECONDS[0])} AND {_first_id(LAST_EVENT_SECONDS[1])}
             ORDER BY id LIMIT {MAX_EVENTS}
         ) AS near
         WHERE this.status IN ({ENDED}) AND near.subject = this.id::text
     ),
     log AS (SELECT * FROM saga_steps WHERE saga_id = (SELECT id FROM this) ORDER BY id DESC LIMIT {MAX_STEPS}),
     pauses AS (
         SELECT pause.*, coalesce(pause.ended_at, pause.ends_at) AS over_at, this.placed_at,
                CASE WHEN this.status IN ({ENDED}) THEN this.updated_at ELSE clock_timestamp() END AS order_until,
                EXISTS (
                    SELECT FROM partner_pauses AS next
                    WHERE next.partner = pause.partner AND next.id > pause.id AND next.paused_at = pause.ended_at
                ) AS is_replaced
         FROM this JOIN partner_pauses AS pause
             ON pause.ends_at > this.placed_at AND coalesce(pause.ended_at, pause.ends_at) > this.placed_at
     ),
     story (rank, name, number, at, source, event, step, attempt, outcome, detail, started_at) AS (
         SELECT 0, 'placed', 0::bigint, placed_at, 'request', 'order-placed', NULL, NULL::int, NULL, NULL,
                NULL::timestamptz FROM this
         UNION ALL
         SELECT 1, 'cancel', 0, cancel_requested_at, 'request', 'cancel-requested', NULL, NULL, NULL, cancel_reason,
                NULL FROM this WHERE cancel_requested_at IS NOT NULL
         UNION ALL
         SELECT 2, 'event-' || sequence, 0, occurred_at, 'outbox', 'event-written', NULL, NULL, NULL, type, NULL
         FROM events
         UNION ALL
         SELECT 3, 'publish-' || sequence, 0, coalesce(first_published_at, published_at), 'broker', 'event-published',
                NULL, NULL, NULL, type, occurred_at
         FROM events WHERE coalesce(first_published_at, published_at) IS NOT NULL
         UNION ALL
         SELECT 4, 'consume', 0, processed_at, 'inbox', 'event-consumed', NULL, NULL, NULL, NULL, NULL
         FROM inbox WHERE consumer = $3 AND message_id = (SELECT id::text FROM this) AND processed_at IS NOT NULL
         UNION ALL
         SELECT 5, 'saga', 0, started_at, 'saga', 'saga-started', NULL, NULL, NULL, NULL, NULL
         FROM sagas WHERE id = (SELECT id FROM this)
         UNION ALL
         SELECT 6, '', id, at, 'saga', action, step, attempt, outcome, detail, started_at FROM log
         UNION ALL
         SELECT 7, 'undo', 0, greatest(compensating_at, (
                    SELECT max(at) FROM saga_steps WHERE saga_id = sagas.id AND action = '{Action.DO}'
                )), 'saga', 'compensation-started', NULL, NULL, NULL, reason, NULL
         FROM sagas WHERE id = (SELECT id FROM this) AND compensating_at IS NOT NULL
         UNION ALL
         SELECT 8, 'act-' || id, 0, at, 'operator', action, NULL, NULL, outcome,
                concat_ws(': ', actor, nullif(reason, '')), NULL
         FROM operator_actions WHERE order_id = (SELECT id FROM this) AND outcome <> '{audit.UNFINISHED}'
         UNION ALL
         SELECT 10, 'pause-' || id, 0, greatest(paused_at, placed_at), 'operator', 'partner-paused', NULL, NULL, NULL,
                concat(partner, ' until ', to_char(ends_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                       CASE WHEN $2::text IS NULL THEN ': ' || reason END),
                NULL
         FROM pauses WHERE paused_at < order_until
         UNION ALL
         SELECT 9, 'resume-' || id, 0, over_at, 'operator',
                CASE WHEN is_replaced THEN 'partner-pause-replaced' ELSE 'partner-resumed' END, NULL, NULL, NULL,
                partner, NULL
         FROM pauses WHERE over_at <= order_until
         UNION ALL
         SELECT 11, '{END}', 0, updated_at, 'order', 'order-' || status, NULL, NULL, status, status_reason, NULL
         FROM this WHERE status IN ({ENDED})
     )
SELECT story.*, split_part(coalesce(
           (SELECT traceparent FROM sagas WHERE id = this.id),
           (SELECT traceparent FROM events ORDER BY sequence LIMIT 1)
       ), '-', 2) AS trace_id
FROM story CROSS JOIN this
ORDER BY CASE WHEN name = '' THEN max(at) OVER (PARTITION BY name ORDER BY number) ELSE at END, rank, number
"""  # noqa: S608 - constants


class TimelineEntry(BaseModel):
    """Something that happened to an order. `at`: null for a step that is still to come (`outcome` is `planned`).

    `source`: `request`, `outbox`, `broker`, `inbox`, `saga`, `operator`, `order` or `plan`. `event`: what happened; for
    a call to a partner `do` or `undo`, with the step, the attempt, and the outcome: `attempted` before the call, then
    `done`, `refused`, `not-sent` or `unknown`. `seconds`: how long the call took, or the event waited in the outbox.
    """

    id: str
    at: str | None
    source: str
    event: str
    step: str | None = None
    attempt: int | None = None
    outcome: str | None = None
    detail: str | None = None
    seconds: float | None = None
    trace_id: str | None = None


class TimelineAnswer(BaseModel):
    """The story of an order so far, the steps still to come, and what it waits for, if something is overdue."""

    order_id: str
    status: str
    entries: list[TimelineEntry]
    why_stuck: WhyStuck | None


@immutable
class Position:
    """The entries that a reader has seen. `last_step`: the last row of the saga's log."""

    last_step: int = 0
    names: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a position from the id of an event. Raises ValueError."""
        if (found := POSITION.fullmatch(text)) is None:
            raise ValueError("must be the id of an event of this stream")
        return cls(int(found[1]), frozenset(filter(None, found[2].split("."))))

    def __str__(self) -> str:
        return ".".join([str(self.last_step), *sorted(self.names)])

    def has_seen(self, entry: TimelineEntry) -> bool:
        """Return whether the reader has seen the entry."""
        return int(entry.id) <= self.last_step if entry.id.isdecimal() else entry.id in self.names

    def after(self, entry: TimelineEntry) -> "Position":
        """Return the position of a reader that has seen this entry, too."""
        if entry.id.isdecimal():
            return Position(max(self.last_step, int(entry.id)), self.names)
        return Position(self.last_step, self.names | {entry.id})

    @property
    def is_at_end(self) -> bool:
        """Return whether the reader has seen the final status."""
        return END in self.names


async def read_entries(pool: db.Pool, order_id: UUID, tenant: str | None, consumer: str) -> list[TimelineEntry]:
    """Return what happened, in order. `tenant` as in `read`. Raises OrderNotFound, DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        return await _read_entries(conn, order_id, tenant, consumer)


async def _read_entries(conn: db.Connection, order_id: UUID, tenant: str | None, consumer: str) -> list[TimelineEntry]:
    rows = await conn.fetch(STORY, order_id, tenant, consumer)
    if not rows:
        raise OrderNotFound(f"there is no order {order_id}")
    return [_entry(row) for row in rows]


def unseen(entries: Iterable[TimelineEntry], position: Position) -> list[TimelineEntry]:
    """Return the entries that a reader has not seen, the final status last."""
    found = [entry for entry in entries if not position.has_seen(entry)]
    return sorted(found, key=lambda entry: entry.id == END)


async def read(pool: db.Pool, order_id: UUID, tenant: str | None, consumer: str) -> TimelineAnswer:
    """Return the timeline of an order. `tenant` None: any, for an operator, who reads why a partner is paused, too.

    `consumer`: the inbox name of the saga's consumer. Raises OrderNotFound.
    """
    async with db.snapshot(pool) as conn:
        answer, _ = await read_situation(conn, order_id, tenant, consumer)
    return answer


async def read_situation(
    conn: db.Connection, order_id: UUID, tenant: str | None, consumer: str
) -> tuple[TimelineAnswer, Situation]:
    """Return the timeline of an order, and the situation that it ends in, from the caller's snapshot."""
    entries = await _read_entries(conn, order_id, tenant, consumer)
    situation = await why_stuck.read(conn, order_id, tenant, consumer)
    answer = TimelineAnswer(
        order_id=str(order_id),
        status=situation.status,
        entries=[*entries, *_planned(situation)],
        why_stuck=why_stuck.explain(situation),
    )
    return answer, situation


def _entry(row: Any) -> TimelineEntry:
    started_at: datetime | None = row["started_at"]
    return TimelineEntry(
        id=row["name"] or str(row["number"]),
        at=rfc3339(row["at"]),
        source=row["source"],
        event=row["event"],
        step=row["step"],
        attempt=row["attempt"],
        outcome=row["outcome"],
        detail=row["detail"],
        seconds=None if started_at is None else round(max(0.0, (row["at"] - started_at).total_seconds()), 6),
        trace_id=row["trace_id"] or None,
    )


def _planned(situation: Situation) -> Sequence[TimelineEntry]:
    """Return the calls that will follow if each succeeds."""
    if (state := _state(situation)) is None:
        return ()
    calls = [decision] if isinstance(decision := plan.decide(state), Call) and not state.attempts else []
    while state.step is not None:
        state = plan.advance(state, Done())
        if isinstance(decision := plan.decide(state), Call):
            calls.append(decision)
    return [
        TimelineEntry(
            id=f"{PLANNED}-{call.action}-{call.step}",
            at=None,
            source="plan",
            event=Action(call.action),
            step=call.step,
            outcome=PLANNED,
        )
        for call in calls
    ]


def _state(situation: Situation) -> SagaState | None:
    """Return where the saga is, or where it will begin; None if no call is to come."""
    if situation.direction is None:
        return plan.begin() if situation.status == Status.PENDING else None
    version = situation.plan_version
    if situation.finished_at is not None or version is None or version not in PLANS:  # the plan of a newer release
        return None
    return SagaState(
        plan_version=version,
        direction=SagaDirection(situation.direction),
        step=situation.step,
        attempts=situation.attempts or 0,
        reason=Reason(situation.reason) if situation.reason else None,
    )

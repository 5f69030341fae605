"""Say in plain words what an order waits for, and whose move it is.

Everything normal takes milliseconds. An order that has waited for GRACE_SECONDS for one and the same thing, or whose
last call failed, is explained; one that moves on is not. The alerts have limits of their own (`ages`).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.errors import OrderNotFound
from app.orders.model import FINAL, rfc3339
from app.saga.plan import SagaDirection
from app.saga.steps import PLANS

GRACE_SECONDS = 5.0

WaitsFor = Literal["inventory", "payment", "shipping", "broker", "database", "operator"]

SITUATION = """
SELECT o.id AS order_id, o.status, o.placed_at, clock_timestamp() AS now,
       s.plan_version, s.direction, s.step, s.attempts, s.reason, s.lease_owner, s.next_attempt_at AS due_at,
       s.updated_at AS saga_updated_at, s.deadline_at, s.finished_at, s.needs_operator_at,
       last.at AS last_at, last.outcome AS last_outcome, last.detail AS last_detail,
       event.id AS event_id, event.type AS event_type, event.parked_at, event.last_error AS event_error,
       event.next_attempt_at AS event_due_at, coalesce(event.pending_since, event.occurred_at) AS event_since,
       placed.published_at, inbox.dead_at, inbox.purged_at, inbox.last_failure_at, inbox.processed_at,
       inbox.last_error AS inbox_error,
       (SELECT max(expires_at) > clock_timestamp() FROM transport_leases) AS has_workers
FROM orders o
LEFT JOIN sagas s ON s.id = o.id
LEFT JOIN LATERAL (SELECT * FROM saga_steps WHERE saga_id = o.id ORDER BY id DESC LIMIT 1) AS last ON true
LEFT JOIN LATERAL (
    SELECT * FROM outbox WHERE subject = o.id::text AND published_at IS NULL ORDER BY sequence LIMIT 1
) AS event ON true
LEFT JOIN outbox placed ON placed.id = o.id
LEFT JOIN inbox ON inbox.message_id = o.id::text AND inbox.consumer = $2
WHERE o.id = $1
"""


class WhyStuck(BaseModel):
    """What an order waits for. `since`: from when. `next_attempt_at`: when it goes on by itself; null: not before then.

    `waiting_for`: the partner, the `broker`, the `database`, or an `operator`, without whom it does not go on.
    """

    message: str
    waiting_for: WaitsFor
    since: str
    next_attempt_at: str | None


@dataclass(frozen=True, slots=True)
class Situation:
    """An order with its saga (`direction` None: it has none), its first unpublished event, and its inbox row."""

    order_id: UUID
    status: str
    placed_at: datetime
    now: datetime
    plan_version: int | None = None
    direction: str | None = None
    step: str | None = None
    attempts: int | None = None
    reason: str | None = None
    lease_owner: str | None = None
    due_at: datetime | None = None
    saga_updated_at: datetime | None = None
    deadline_at: datetime | None = None
    finished_at: datetime | None = None
    needs_operator_at: datetime | None = None
    last_at: datetime | None = None
    last_outcome: str | None = None
    last_detail: str | None = None
    event_id: UUID | None = None
    event_type: str | None = None
    parked_at: datetime | None = None
    event_error: str | None = None
    event_due_at: datetime | None = None
    event_since: datetime | None = None
    published_at: datetime | None = None
    dead_at: datetime | None = None
    purged_at: datetime | None = None
    last_failure_at: datetime | None = None
    processed_at: datetime | None = None
    inbox_error: str | None = None
    has_workers: bool | None = None

    def is_long_ago(self, instant: datetime | None) -> bool:
        """Return whether an instant is longer ago than anything normal takes."""
        return instant is not None and self.now - instant > timedelta(seconds=GRACE_SECONDS)


async def read(conn: db.Connection, order_id: UUID, consumer: str) -> Situation:
    """Read the situation of an order. Raises OrderNotFound."""
    row: Any = await conn.fetchrow(SITUATION, order_id, consumer)
    if row is None:
        raise OrderNotFound(f"there is no order {order_id}")
    return Situation(**row)


def explain(at: Situation) -> WhyStuck | None:
    """Return what the order waits for; None if it has ended, or moves on."""
    if at.event_id is not None and (at.direction is None or at.status in FINAL):
        return _explain_event(at)
    if at.status in FINAL or at.finished_at is not None:
        return None
    return _explain_start(at) if at.direction is None else _explain_saga(at)


def _explain_event(at: Situation) -> WhyStuck | None:
    """Explain an event that is not published: that of a new order, or that of its end."""
    what = f"Its event {_short(at.event_type)}"
    if at.parked_at is not None:
        fix = f"An operator must fix the cause, then run: orders outbox requeue {at.event_id}"
        return _stuck(f"{what} is parked: it was refused too often ({at.event_error}). {fix}", "operator", at.parked_at)
    if not at.is_long_ago(at.event_since):
        return None
    since = at.event_since or at.placed_at
    if not at.has_workers:
        return _stuck(f"{what} waits to be published, and no process with the role relay runs.", "operator", since)
    problem = f" The broker's last refusal: {at.event_error}." if at.event_error else ""
    return _stuck(
        f"{what} waits to be published. The relay publishes it when the broker takes it.{problem}",
        "broker",
        since,
        at.event_due_at,
    )


def _explain_start(at: Situation) -> WhyStuck | None:
    """Explain an order whose event is published, but whose saga has not started."""
    if at.purged_at is not None:
        return _stuck(
            "An operator purged its event, so its saga does not start. An operator must end it: "
            f"orders saga compensate {at.order_id}",
            "operator",
            at.purged_at,
        )
    if at.dead_at is not None:
        return _stuck(
            f"Its event is a dead letter: the consumer failed too often ({at.inbox_error or 'the broker gave it up'}). "
            f"An operator must fix the cause, then run: orders dlq replay --id {at.order_id}",
            "operator",
            at.dead_at,
        )
    if at.last_failure_at is not None and at.processed_at is None:
        return _stuck(
            f"The consumer failed to handle its event ({at.inbox_error}). The broker delivers it again.",
            "database",
            at.last_failure_at,
        )
    if not at.is_long_ago(at.published_at):
        return None
    since = at.published_at or at.placed_at
    if not at.has_workers:
        return _stuck("Its event is published, and no process with the role consumer runs.", "operator", since)
    return _stuck(
        "Its event is published, and no consumer has taken it yet. If the broker lost it, it is published again "
        "about a minute after its publication.",
        "broker",
        since,
    )


def _explain_saga(at: Situation) -> WhyStuck | None:
    partner, call = _partner(at), _call(at)
    since = at.last_at or at.saga_updated_at or at.placed_at
    if at.step is None:
        return _if_long_ago(at, "Every step is done, and the end is not recorded yet.", "database", since, at.due_at)
    if at.lease_owner is None and at.is_long_ago(at.due_at):
        owed = "no process has taken it. Start one with the role consumer, or give them more saga_concurrency."
        return _stuck(f"Its saga is due, and {owed}", "operator", at.due_at or since)
    if at.lease_owner is not None and at.is_long_ago(at.due_at):
        gone = f"The process {at.lease_owner} stopped in the middle, and no other process has taken the saga over."
        return _stuck(f"{gone} Start one with the role consumer.", "operator", at.due_at or since)
    if at.lease_owner is not None and at.last_outcome == "attempted":
        return _if_long_ago(at, f"{partner} has not answered {call} yet.", partner, since, at.due_at)
    if at.lease_owner is not None:
        return _if_long_ago(at, "Its next write waits for the database.", "database", since, at.due_at)
    answer = _answer(at)
    if at.needs_operator_at is not None and at.needs_operator_at <= at.now:
        return _stuck(
            f"{partner} keeps failing {call}: {answer}. An operator must look at it; retries go on.",
            "operator",
            since,
            at.due_at,
        )
    late = " Its deadline has passed; at the next attempt it starts to compensate." if _is_late(at) else ""
    if not at.attempts:
        return _stuck(
            f"Calls to {partner} are paused, because they failed: its circuit is open. {call} is to come.{late}",
            partner,
            at.saga_updated_at or since,
            at.due_at,
        )
    return _stuck(f"{partner} failed {call}: {answer}. It is retried.{late}", partner, since, at.due_at)


def _is_late(at: Situation) -> bool:
    return at.direction == SagaDirection.FORWARD and at.deadline_at is not None and at.deadline_at <= at.now


def _partner(at: Situation) -> Any:
    steps = {spec.step: spec.partner for spec in PLANS.get(at.plan_version or 0, ())}
    return steps.get(at.step or "", "operator")  # a step that this release does not know


def _call(at: Situation) -> str:
    call = f"the undo of {at.step}" if at.direction == SagaDirection.BACKWARD else at.step
    return f"{call} (attempt {at.attempts})" if at.attempts else f"{call}"


def _answer(at: Situation) -> str:
    meaning = {"unknown": "no clear answer", "not-sent": "it could not be reached", "refused": "refused"}
    text = meaning.get(at.last_outcome or "", at.last_outcome or "no answer")
    return f"{text} ({at.last_detail})" if at.last_detail else text


def _short(event_type: str | None) -> str:
    return (event_type or "").removeprefix("orders.").removesuffix(".v1")


def _if_long_ago(
    at: Situation, message: str, waiting_for: WaitsFor, since: datetime, next_at: datetime | None
) -> WhyStuck | None:
    return _stuck(message, waiting_for, since, next_at) if at.is_long_ago(since) else None


def _stuck(message: str, waiting_for: WaitsFor, since: datetime, next_at: datetime | None = None) -> WhyStuck:
    return WhyStuck(
        message=message[:1].upper() + message[1:],
        waiting_for=waiting_for,
        since=rfc3339(since),
        next_attempt_at=None if next_at is None else rfc3339(next_at),
    )

"""Say in plain words what an order waits for, and whose move it is.

Everything normal takes milliseconds. An order that has waited for GRACE_SECONDS for one and the same thing, or whose
last call failed, is explained; one that moves on is not. The alerts have limits of their own (`ages`).
"""

from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel

from app import db
from app.errors import OrderNotFound
from app.messaging import local
from app.orders.model import FINAL, rfc3339
from app.saga.pauses import IN_FORCE, STEP_PARTNERS
from app.saga.plan import SagaDirection
from app.saga.steps import PLANS, Action
from app.values import immutable

GRACE_SECONDS = 5.0

WaitsFor = Literal["inventory", "payment", "shipping", "broker", "database", "operator"]

# `call`: the saga's log of its current call. MATERIALIZED: with ORDER BY id LIMIT 1 alone, the planner may walk the log
# of all sagas backward. Parameters: the order, its tenant (NULL: any, for an operator, who reads why a partner is
# paused), the inbox name of the saga's consumer.
SITUATION = f"""
WITH log AS MATERIALIZED (
         SELECT id, at, step, action, attempt, outcome, detail FROM saga_steps WHERE saga_id = $1
     ),
     call AS (
         SELECT log.* FROM log JOIN sagas ON sagas.id = $1 AND sagas.step = log.step
             AND log.action = CASE sagas.direction WHEN 'forward' THEN '{Action.DO}' ELSE '{Action.UNDO}' END
     )
SELECT o.id AS order_id, o.status, o.placed_at, clock_timestamp() AS now,
       s.plan_version, s.direction, s.step, s.attempts, s.reason, s.lease_owner, s.next_attempt_at AS due_at,
       s.deadline_at, s.finished_at, s.needs_operator_at,
       (SELECT max(at) FROM log) AS last_at, (SELECT outcome FROM log ORDER BY id DESC LIMIT 1) AS last_outcome,
       (SELECT min(at) FROM call) AS call_since,
       answer.attempt AS answer_attempt, answer.outcome AS answer, answer.detail AS answer_detail,
       event.id AS event_id, event.type AS event_type, event.parked_at, event.last_error AS event_error,
       event.next_attempt_at AS event_due_at, coalesce(event.pending_since, event.occurred_at) AS event_since,
       placed.published_at, inbox.dead_at, inbox.purged_at, inbox.last_failure_at, inbox.processed_at,
       inbox.last_error AS inbox_error, inbox.attempts AS inbox_attempts,
       pause.paused_at, pause.ends_at AS pause_ends_at,
       CASE WHEN $2::text IS NULL THEN pause.reason END AS pause_reason,
       (SELECT max(transport) FROM transport_leases WHERE expires_at > clock_timestamp()) AS transport
FROM orders o
LEFT JOIN sagas s ON s.id = o.id
LEFT JOIN LATERAL (SELECT * FROM call WHERE outcome <> 'attempted' ORDER BY id DESC LIMIT 1) AS answer ON true
LEFT JOIN LATERAL (
    SELECT * FROM outbox WHERE subject = o.id::text AND published_at IS NULL ORDER BY sequence LIMIT 1
) AS event ON true
LEFT JOIN outbox placed ON placed.id = o.id
LEFT JOIN inbox ON inbox.message_id = o.id::text AND inbox.consumer = $3
LEFT JOIN LATERAL (
    SELECT paused_at, ends_at, reason FROM partner_pauses JOIN {STEP_PARTNERS} USING (partner)
    WHERE {IN_FORCE} AND step_partners.plan_version = s.plan_version AND step_partners.step = s.step LIMIT 1
) AS pause ON true
WHERE o.id = $1 AND ($2::text IS NULL OR o.tenant = $2)
"""  # noqa: S608 - constants


class WhyStuck(BaseModel):
    """What an order waits for. `since`: from when. `next_attempt_at`: of the retry; null: none is scheduled.

    `waiting_for`: the partner, the `broker`, the `database`, or an `operator`, who has to act or to look.
    """

    message: str
    waiting_for: WaitsFor
    since: str
    next_attempt_at: str | None


@immutable
class Situation:
    """An order with its saga (`direction` None: it has none), its first unpublished event, and its inbox row.

    `last_at`, `last_outcome`: of the saga's log. `call_since`: when the current call was first attempted; `answer`: the
    last outcome of that call. `transport`: of the processes with the roles relay and consumer; None: none runs.
    `paused_at`, `pause_ends_at`, `pause_reason`: of an operator's pause of the current step's partner; the reason is
    None for a tenant.
    """

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
    deadline_at: datetime | None = None
    finished_at: datetime | None = None
    needs_operator_at: datetime | None = None
    last_at: datetime | None = None
    last_outcome: str | None = None
    call_since: datetime | None = None
    answer_attempt: int | None = None
    answer: str | None = None
    answer_detail: str | None = None
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
    inbox_attempts: int | None = None
    transport: str | None = None
    paused_at: datetime | None = None
    pause_ends_at: datetime | None = None
    pause_reason: str | None = None

    def is_long_ago(self, instant: datetime | None) -> bool:
        """Return whether an instant is longer ago than anything normal takes."""
        return instant is not None and self.now - instant > timedelta(seconds=GRACE_SECONDS)

    @property
    def is_calling(self) -> bool:
        """Return whether a process has recorded an attempt and waits for the partner's answer."""
        return self.lease_owner is not None and self.last_outcome == "attempted"

    @property
    def is_dead(self) -> bool:
        """Return whether `order.placed` is a dead letter, or was purged as one."""
        return self.dead_at is not None and self.processed_at is None

    @property
    def is_parked_dead_letter(self) -> bool:
        """Return whether the parked event is a dead letter too, as without a broker.

        A requeue would not reset its attempts in the inbox: the next failure would park it again. A replay does.
        """
        return self.parked_at is not None and self.is_dead and self.event_id == self.order_id


async def read(conn: db.Connection, order_id: UUID, tenant: str | None, consumer: str) -> Situation:
    """Read the situation of an order. `tenant` None: any, for an operator. Raises OrderNotFound."""
    row: Any = await conn.fetchrow(SITUATION, order_id, tenant, consumer)
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
        command = "dlq replay --id" if at.is_parked_dead_letter else "outbox requeue"
        fix = f"An operator must fix the cause, then run: orders {command} {at.event_id}"
        return _stuck(f"{what} is parked: it was refused too often ({at.event_error}). {fix}", "operator", at.parked_at)
    since = at.event_since or at.placed_at
    next_at = at.event_due_at if at.event_due_at is not None and at.event_due_at > at.now else None
    if at.transport == local.NAME and at.event_error:
        return _stuck(f"Handling {what[0].lower() + what[1:]} failed ({at.event_error}).", "database", since, next_at)
    if not at.is_long_ago(since):
        return None
    if at.transport is None:
        return _stuck(f"{what} waits to be published, and no process with the role relay runs.", "operator", since)
    if at.transport == local.NAME:
        return _stuck(f"{what} waits to be handled: others are before it, or Postgres is slow.", "database", since)
    problem = (
        f"The broker's last refusal: {at.event_error}."
        if at.event_error
        else "If the broker is up, check that a process with the role relay runs."
    )
    return _stuck(
        f"{what} waits to be published. The relay publishes it when the broker takes it. {problem}",
        "broker",
        since,
        next_at,
    )


def _explain_start(at: Situation) -> WhyStuck | None:
    """Explain an order whose saga has not started, although no event of it waits to be published."""
    end = f"An operator must end it: orders saga compensate {at.order_id}"
    if at.purged_at is not None:
        return _stuck(f"An operator purged its event, so its saga does not start. {end}", "operator", at.purged_at)
    if at.processed_at is not None:
        return _stuck(f"Its event was handled, but its saga is missing. {end}", "operator", at.processed_at)
    if at.dead_at is not None:
        return _stuck(
            f"Its event is a dead letter: the consumer failed too often ({at.inbox_error or 'the broker gave it up'}). "
            f"An operator must fix the cause, then run: orders dlq replay --id {at.order_id}",
            "operator",
            at.dead_at,
        )
    if at.published_at is None:
        missing = f"Its event is missing in the outbox, so its saga does not start. {end}"
        return _stuck(missing, "operator", at.placed_at) if at.is_long_ago(at.placed_at) else None
    has_failed = at.last_failure_at is not None and bool(at.inbox_attempts)  # no attempts: an operator replayed it
    if at.transport is None and (has_failed or at.is_long_ago(at.published_at)):
        waits = "Its event is published, and no process with the role consumer runs."
        return _stuck(waits, "operator", at.published_at)
    if has_failed:
        return _stuck(
            f"The consumer failed to handle its event ({at.inbox_error}). The broker delivers it again.",
            "database",
            at.last_failure_at or at.published_at,
        )
    if not at.is_long_ago(at.published_at):
        return None
    return _stuck(
        "Its event is published, and no consumer has taken it yet: check that a process with the role consumer runs. "
        "If the broker lost it, it is published again about a minute after its publication.",
        "broker",
        at.published_at,
    )


def _explain_saga(at: Situation) -> WhyStuck | None:
    last_at = at.last_at or at.placed_at
    if at.is_long_ago(at.due_at):
        return _explain_overdue(at)
    if (partner := _find_partner(at)) is None:
        newer = f"It follows plan {at.plan_version}, which this release does not know. Ask a process of the newer one."
        return _if_long_ago(at, newer, "operator", last_at)
    call = f"the undo of {at.step}" if at.direction == SagaDirection.BACKWARD else f"{at.step}"
    if at.lease_owner is None and at.pause_ends_at is not None:
        return _explain_pause(at, partner, call, at.pause_ends_at)
    if at.is_calling and at.attempts == 1:
        return _if_long_ago(at, f"{partner} has not answered {call} yet.", partner, last_at)
    if at.attempts:
        message, since = f"{_describe_failure(at, partner, call)}{_describe_retry(at)}", at.call_since or last_at
    elif at.lease_owner is None and at.due_at is not None and at.due_at > at.now:
        since = last_at
        message = f"Calls to {partner} wait, because earlier ones failed: its circuit is open. Next: {call}."
    else:
        return _if_long_ago(at, "Its next attempt is not recorded yet.", "database", last_at)
    next_at = at.due_at if at.lease_owner is None else None
    if at.needs_operator_at is not None and at.needs_operator_at <= at.now:
        return _stuck(f"{message} An operator must look at it; retries go on.", "operator", since, next_at)
    late = at.direction == SagaDirection.FORWARD and at.deadline_at is not None and at.deadline_at <= at.now
    deadline = " Its deadline has passed; at the next attempt it starts to compensate." if late else ""
    return _stuck(f"{message}{deadline}", partner, since, next_at)


def _explain_pause(at: Situation, partner: WaitsFor, call: str, ends_at: datetime) -> WhyStuck:
    """Explain a saga that waits for the end of an operator's pause. Its deadline may come first."""
    reason = f": {at.pause_reason}" if at.pause_reason else ""
    message = f"An operator paused calls to {partner} until {rfc3339(ends_at)}{reason}. Next: {call}."
    since = max(at.last_at or at.placed_at, at.paused_at or at.placed_at)
    if at.direction == SagaDirection.FORWARD and at.deadline_at is not None and at.deadline_at < ends_at:
        message += f" Its deadline, {rfc3339(at.deadline_at)}, comes first: then it starts to compensate."
        ends_at = at.deadline_at
    return _stuck(message, partner, since, ends_at)


def _explain_overdue(at: Situation) -> WhyStuck:
    """Explain a saga that no process has claimed although it is due."""
    if at.lease_owner is None:
        why = "Its saga is due, and no process has taken it. Start one with the role consumer, or raise "
        why += "ORDERS_SAGA_CONCURRENCY."
    else:
        why = f"The process {at.lease_owner} stopped in the middle, and no other process has taken the saga over. "
        why += "Start one with the role consumer."
    return _stuck(why, "operator", at.due_at or at.placed_at)


def _find_partner(at: Situation) -> WaitsFor | None:
    """Return the partner of the current step. None: the plan belongs to a newer release."""
    steps: dict[str, Any] = {spec.step: spec.partner for spec in PLANS.get(at.plan_version or 0, ())}
    return steps.get(at.step or "")


def _describe_failure(at: Situation, partner: str, call: str) -> str:
    if at.answer is None:
        return f"The process that made {call} (attempt {at.attempts}) stopped before it recorded {partner}'s answer."
    meaning = {"unknown": "no clear answer", "not-sent": "it could not be reached"}.get(at.answer, at.answer)
    detail = f" ({at.answer_detail})" if at.answer_detail else ""
    return f"{partner} failed {call} (attempt {at.answer_attempt}): {meaning}{detail}."


def _describe_retry(at: Situation) -> str:
    return f" Attempt {at.attempts} is in progress." if at.is_calling else " It is retried."


def _short(event_type: str | None) -> str:
    return (event_type or "").removeprefix("orders.").removesuffix(".v1")


def _if_long_ago(at: Situation, message: str, waiting_for: WaitsFor, since: datetime) -> WhyStuck | None:
    return _stuck(message, waiting_for, since) if at.is_long_ago(since) else None


def _stuck(message: str, waiting_for: WaitsFor, since: datetime, next_at: datetime | None = None) -> WhyStuck:
    return WhyStuck(
        message=message[:1].upper() + message[1:],
        waiting_for=waiting_for,
        since=rfc3339(since),
        next_attempt_at=None if next_at is None else rfc3339(next_at),
    )

"""Which rows may wait how long, who moves them on, and which metric and alert report them when they wait longer (I6).

`LIMITS` has one row for each state of each table. The gauge `age_limit_exceeded_rows`, `orders verify`, the table in
docs/ages.md and the checks of the alert rules read it. Ages are those of Postgres's clock.
"""

from collections.abc import Collection, Iterator
from uuid import UUID

from app import db
from app.messaging.outbox import PENDING
from app.operations.audit import UNFINISHED
from app.saga.pauses import IN_FORCE, STEP_PARTNERS
from app.values import immutable

GAUGE = "age_limit_exceeded_rows"  # for states without a metric of their own
ALERT = "AgeLimitExceeded"
COUNTED_ROWS = 10_000  # a count stops there: beyond it, the exact number tells an operator nothing more

LEASE_SECONDS = 30.0  # the default of ORDERS_OUTBOX_LEASE_SECONDS; a claimed row may wait for two leases
REPORTED_SECONDS = 86_400.0  # for how long an unfinished command is reported


@immutable
class AgeLimit:
    """How long rows of a table may be in one state.

    `owner`: the role or person that moves a row on, or `none`. `limit_seconds`: 0: an operator must look at once; None:
    such rows may stay, and `note` says why. `overdue`: the SQL after FROM that selects the rows past the limit.
    `order_id`: the SQL expression for the order of such a row; None: the row belongs to no order.
    """

    table: str
    state: str
    owner: str
    note: str
    limit_seconds: float | None = None
    metric: str | None = None
    alert: str | None = None
    overdue: str = ""
    order_id: str | None = None


def _older(column: str, seconds: float) -> str:
    """Return the condition; `clock_timestamp()` is volatile, so it is in a subselect that runs once."""
    return f"{column} < (SELECT clock_timestamp() - interval '{seconds:g} s')"


PENDING_SINCE = "coalesce(pending_since, occurred_at)"
# `order.placed` has the id of its order. A resent event was published before, so its first publication counts.
EVENT_TIME = """coalesce((
    SELECT coalesce(first_published_at, pending_since, occurred_at) FROM outbox WHERE outbox.id = orders.id
), placed_at)"""
NO_SAGA = "(SELECT sagas.id FROM sagas WHERE sagas.id = orders.id) IS NULL"
PAUSED = f"""EXISTS (
    SELECT FROM partner_pauses JOIN {STEP_PARTNERS} USING (partner)
    WHERE {IN_FORCE} AND step_partners.plan_version = sagas.plan_version AND step_partners.step = sagas.step
)"""
# A message id is that of an outbox row, and the subject of a row is the id of its order.
SUBJECT = "(SELECT outbox.subject::uuid FROM outbox WHERE outbox.id = inbox.message_id::uuid)"

LIMITS: tuple[AgeLimit, ...] = (
    AgeLimit(
        "outbox",
        "waiting",
        owner="relay",
        note="not yet claimed, while the broker is down too",
        limit_seconds=60,
        metric="outbox_oldest_pending_age_seconds",
        alert="OutboxOldestPending",
        overdue=f"outbox WHERE {PENDING} AND claim_token IS NULL AND {_older(PENDING_SINCE, 60)}",
        order_id="subject::uuid",
    ),
    AgeLimit(
        "outbox",
        "claimed",
        owner="relay",
        note="by a relay that has died: its lease has ended, and no other relay has claimed the row",
        limit_seconds=2 * LEASE_SECONDS,
        metric="outbox_oldest_pending_age_seconds",
        alert="OutboxOldestPending",
        overdue=f"outbox WHERE {PENDING} AND claim_token IS NOT NULL AND {_older('next_attempt_at', LEASE_SECONDS)}",
        order_id="subject::uuid",
    ),
    AgeLimit(
        "outbox",
        "parked",
        owner="operator",
        note="the broker refused the event too often",
        limit_seconds=0,
        metric="outbox_parked",
        alert="OutboxParked",
        overdue="outbox WHERE published_at IS NULL AND parked_at IS NOT NULL",
        order_id="subject::uuid",
    ),
    AgeLimit("outbox", "published", owner="janitor", note="kept for the retention, and until its order is final"),
    AgeLimit(
        "orders",
        "without a saga",
        owner="consumer",
        note="its event is not published, not consumed, a dead letter, or purged",
        limit_seconds=120,
        metric="orders_unstarted",
        alert="OrdersUnstarted",
        overdue=f"orders WHERE status = 'pending' AND {NO_SAGA} AND {_older(EVENT_TIME, 120)}",
        order_id="orders.id",
    ),
    AgeLimit("orders", "with a saga", owner="consumer", note="the limits of its saga apply"),
    AgeLimit("orders", "final", owner="none", note="never removed"),
    AgeLimit("order_lines", "any", owner="none", note="part of their order"),
    AgeLimit(
        "sagas",
        "due",
        owner="consumer",
        note="no process claims it: none has the role `consumer`, or all are busy",
        limit_seconds=60,
        metric=GAUGE,
        alert=ALERT,
        overdue=f"sagas WHERE finished_at IS NULL AND {_older('next_attempt_at', 60)}",
        order_id="sagas.id",
    ),
    AgeLimit(
        "sagas",
        "late",
        owner="consumer",
        note="60 s past its deadline; it compensates, and a partner does not undo. While an operator pauses that"
        " partner, [PartnerPaused](runbook.md#partnerpaused) fires instead",
        limit_seconds=60,
        metric=GAUGE,
        alert=ALERT,
        overdue=f"sagas WHERE finished_at IS NULL AND {_older('deadline_at', 60)} AND NOT {PAUSED}",
        order_id="sagas.id",
    ),
    AgeLimit(
        "sagas",
        "undo fails",
        owner="operator",
        note="an undo has failed for `ORDERS_SAGA_NEEDS_OPERATOR_SECONDS`, 300 s by default; retries continue",
        limit_seconds=300,
        metric="saga_needs_operator",
        alert="SagaNeedsOperator",
        overdue="sagas WHERE finished_at IS NULL AND direction = 'backward' AND needs_operator_at <= clock_timestamp()",
        order_id="sagas.id",
    ),
    AgeLimit(
        "sagas",
        "needs an operator",
        owner="operator",
        note="a call got an answer that retrying cannot fix; retries continue",
        limit_seconds=0,
        metric="saga_needs_operator",
        alert="SagaNeedsOperator",
        overdue="sagas WHERE finished_at IS NULL AND direction = 'forward' AND needs_operator_at <= clock_timestamp()",
        order_id="sagas.id",
    ),
    AgeLimit("sagas", "finished", owner="janitor", note="kept for the retention"),
    AgeLimit(
        "saga_steps", "any", owner="consumer", note="a log: the limits of its saga apply, and it goes with its saga"
    ),
    AgeLimit(
        "inbox",
        "failing",
        owner="consumer",
        note="the handler failed, and the message has not been delivered again since",
        limit_seconds=300,
        metric="orders_unstarted",
        alert="OrdersUnstarted",
        overdue="inbox WHERE attempts > 0 AND processed_at IS NULL AND dead_at IS NULL AND "
        + _older("last_failure_at", 300),
        order_id=SUBJECT,
    ),
    AgeLimit(
        "inbox",
        "dead letter",
        owner="operator",
        note="the message could not be handled",
        limit_seconds=0,
        metric="dlq_depth",
        alert="DeadLetters",
        overdue="inbox WHERE dead_at IS NOT NULL AND processed_at IS NULL AND purged_at IS NULL",
        order_id=SUBJECT,
    ),
    AgeLimit("inbox", "processed", owner="janitor", note="kept for the retention"),
    AgeLimit(
        "inbox", "purged", owner="none", note="kept for good; its order, if it has not started, has its own limit"
    ),
    AgeLimit(
        "idempotency_keys",
        "expired",
        owner="janitor",
        note="an hour past its expiry; a new request with the key takes an expired row over at any time",
        limit_seconds=3600,
        metric=GAUGE,
        alert=ALERT,
        overdue=f"idempotency_keys WHERE {_older('expires_at', 3600)}",
    ),
    AgeLimit("idempotency_keys", "live", owner="janitor", note="until its expiry"),
    AgeLimit(
        "transport_leases",
        "expired",
        owner="relay, consumer",
        note="its process was killed, and since then no process with one of these roles has renewed a lease",
        limit_seconds=60,
        metric=GAUGE,
        alert=ALERT,
        overdue=f"transport_leases WHERE {_older('expires_at', 60)}",
    ),
    AgeLimit("transport_leases", "live", owner="relay, consumer", note="renewed every 5 s"),
    AgeLimit(
        "operator_actions",
        "unfinished",
        owner="operator",
        note="the command was killed: run it again. The row stays; it is reported for a day",
        limit_seconds=3600,
        metric=GAUGE,
        alert=ALERT,
        overdue=f"operator_actions WHERE outcome = '{UNFINISHED}' AND {_older('at', 3600)}"
        f" AND NOT {_older('at', REPORTED_SECONDS)}",
        order_id="operator_actions.order_id",
    ),
    AgeLimit("partner_pauses", "any", owner="none", note="a pause ends by itself; its row is kept for good"),
    AgeLimit("operator_actions", "finished", owner="none", note="kept for good"),
)


def limited() -> Iterator[AgeLimit]:
    """Return the states whose rows have an age limit."""
    return (limit for limit in LIMITS if limit.limit_seconds is not None)


def gauged() -> Iterator[AgeLimit]:
    """Return the states that only the gauge `age_limit_exceeded_rows` reports."""
    return (limit for limit in LIMITS if limit.metric == GAUGE)


async def count_overdue(conn: db.Connection, limits: Collection[AgeLimit]) -> dict[tuple[str, str], int]:
    """Return how many rows are past each of these limits, by table and state, each up to `COUNTED_ROWS`."""
    counts = " UNION ALL ".join(
        f"SELECT {place}, (SELECT count(*) FROM (SELECT FROM {limit.overdue} LIMIT {COUNTED_ROWS}) AS overdue)"  # noqa: S608 - constants
        for place, limit in enumerate(limits)
    )
    found = {place: rows for place, rows in await conn.fetch(counts)} if counts else {}  # noqa: C416 - records
    return {(limit.table, limit.state): found[place] for place, limit in enumerate(limits)}


async def list_overdue(conn: db.Connection, limit: AgeLimit, at_most: int) -> list[UUID]:
    """Return the orders of up to `at_most` rows past this limit. A row without an order adds none."""
    if limit.order_id is None:
        return []
    rows = await conn.fetch(
        f"SELECT {limit.order_id} AS order_id FROM {limit.overdue} LIMIT {at_most:d}"  # noqa: S608 - constants and a number
    )
    return [UUID(int=row["order_id"].int) for row in rows if row["order_id"] is not None]

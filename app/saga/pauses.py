"""Pauses of partners: an operator stops every call to a partner, for a time. The rows, and what a process knows.

A row of `partner_pauses` is one pause. It is in force until `ends_at`, or until `ended_at` if an operator ended or
replaced it before. At most one pause of a partner is in force: the writers lock the table.

While its partner is paused, a saga waits in `next_attempt_at` without recording an attempt, as for an open circuit, and
looks again now and then. When a pause ends, each process makes the sagas that wait for the partner due (`release`).
"""

import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Identity, Index, Table, Text

from app import db
from app.saga.plan import SagaDirection
from app.saga.steps import PLANS, Plans
from app.values import immutable

partner_pauses = Table(
    "partner_pauses",
    db.metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("partner", Text, nullable=False),
    Column("paused_at", DateTime(timezone=True), nullable=False),
    Column("ends_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index("partner_pauses_ends_at_idx", "ends_at"),
)

# The condition for a pause that is in force. `clock_timestamp()` is volatile; in a subselect it is evaluated once.
IN_FORCE = "partner_pauses.ended_at IS NULL AND partner_pauses.ends_at > (SELECT clock_timestamp())"

COUNTED_ORDERS = 10_000  # beyond it, the exact number tells an operator nothing more

# The partner of each step, to join with `plan_version` and `step` of a saga.
STEP_PARTNERS = "(VALUES {}) AS step_partners (partner, plan_version, step)".format(
    ", ".join(f"('{spec.partner}', {version:d}, '{spec.step}')" for version in sorted(PLANS) for spec in PLANS[version])
)


@immutable
class PartnerPause:
    """A pause in force: by whom, why, and until when."""

    partner: str
    paused_at: datetime
    ends_at: datetime
    actor: str
    reason: str


@immutable
class LateOrders:
    """Orders that a pause would reject: `number` unfinished ones, and those that are placed before `placed_before`.

    `has_more`: there are more than `number`. `placed_before` None: new orders reach their deadline after the pause, or
    no saga tells how much time they get.
    """

    number: int
    placed_before: datetime | None
    has_more: bool = False


class PartnerPauses:
    """The pauses that this process knows of. `known`: they have been read. `clock` returns seconds.

    Each pause ends by itself, also while Postgres is down.
    """

    def __init__(self, *, known: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.known = known
        self._clock = clock
        self._until: dict[str, float] = {}  # on `clock`

    def remaining_seconds(self, partner: str) -> float | None:
        """Return for how long the partner is still paused; None: it is not."""
        remaining = self._until.get(partner, 0.0) - self._clock()
        return remaining if remaining > 0 and partner in self._until else None

    def is_paused(self, partner: str) -> bool:
        """Return whether the partner is paused."""
        return self.remaining_seconds(partner) is not None

    def update(self, remaining_seconds: Mapping[str, float]) -> set[str]:
        """Replace what is known. Return the partners that were paused at the last update, and are not any more."""
        now = self._clock()
        ended = self._until.keys() - remaining_seconds.keys()
        self._until = {partner: now + seconds for partner, seconds in remaining_seconds.items()}
        self.known = True
        return ended


async def read_remaining(conn: db.Connection) -> dict[str, float]:
    """Return for how many seconds each paused partner is still paused."""
    rows = await conn.fetch(
        f"""
        SELECT partner, extract(epoch FROM ends_at - clock_timestamp())::float8 AS seconds
        FROM partner_pauses WHERE {IN_FORCE}
        """  # noqa: S608 - a constant
    )
    return {row["partner"]: row["seconds"] for row in rows}


async def read_resumed(conn: db.Connection, within_seconds: float) -> set[str]:
    """Return the partners with a pause that an operator ended or replaced before its time, which has not come yet.

    `within_seconds`: not longer ago than that.
    """
    rows = await conn.fetch(
        """
        SELECT DISTINCT partner FROM partner_pauses
        WHERE ended_at > (SELECT clock_timestamp()) - make_interval(secs => $1)
          AND ends_at > (SELECT clock_timestamp())
        """,
        within_seconds,
    )
    return {row["partner"] for row in rows}


async def list_in_force(conn: db.Connection) -> list[PartnerPause]:
    """Return the pauses in force."""
    rows = await conn.fetch(
        f"SELECT partner, paused_at, ends_at, actor, reason FROM partner_pauses WHERE {IN_FORCE}"  # noqa: S608 - a constant
    )
    return [_parse(row) for row in rows]


async def begin(
    conn: db.Connection, partner: str, seconds: float, actor: str, reason: str
) -> tuple[PartnerPause, bool]:
    """Pause the partner from now on, in the caller's transaction. Return the pause, and whether it replaces one."""
    await _lock(conn)
    row: Any = await conn.fetchrow(
        f"""
        WITH now AS MATERIALIZED (SELECT clock_timestamp() AS at), replaced AS (
            UPDATE partner_pauses SET ended_at = now.at FROM now WHERE partner = $1 AND {IN_FORCE} RETURNING partner
        )
        INSERT INTO partner_pauses (partner, paused_at, ends_at, actor, reason)
        SELECT $1, now.at, now.at + make_interval(secs => $2), $3, $4 FROM now
        RETURNING partner, paused_at, ends_at, actor, reason, EXISTS (SELECT FROM replaced) AS replaces
        """,  # noqa: S608 - a constant
        partner,
        seconds,
        actor,
        reason,
    )
    return _parse(row), row["replaces"]


async def end(conn: db.Connection, partner: str) -> bool:
    """End the partner's pause, in the caller's transaction. Return false if no pause is in force."""
    await _lock(conn)
    status = await conn.execute(
        f"UPDATE partner_pauses SET ended_at = clock_timestamp() WHERE partner = $1 AND {IN_FORCE}",  # noqa: S608 - a constant
        partner,
    )
    return db.affected(status) > 0


async def find_late(
    conn: db.Connection, partner: str, ends_at: datetime, plans: Plans = PLANS, limit: int = COUNTED_ORDERS
) -> LateOrders:
    """Find out which orders a pause of the partner until `ends_at` would reject: they reach their deadline before.

    An order whose saga has not started gets its deadline when it starts: at the earliest now, plus the time that the
    newest saga was given. Orders that a customer or an operator cancelled are not counted.
    The count stops at `limit`.
    """
    places = [
        (version, spec.step)
        for version, steps in plans.items()
        for number, spec in enumerate(steps)
        if any(later.partner == partner for later in steps[number:])
    ]
    row: Any = await conn.fetchrow(
        """
        WITH late AS MATERIALIZED (
            SELECT placed_before FROM (
                SELECT $2::timestamptz - (deadline_at - started_at) AS placed_before FROM sagas ORDER BY id DESC LIMIT 1
            ) AS newest
            WHERE placed_before >= clock_timestamp()
        )
        SELECT (SELECT count(*) FROM (
            (
                SELECT FROM sagas JOIN orders USING (id)
                WHERE finished_at IS NULL AND direction = $1 AND deadline_at <= $2 AND cancel_requested_at IS NULL
                  AND (plan_version, step) IN (SELECT * FROM unnest($3::smallint[], $4::text[]))
                LIMIT $5
            ) UNION ALL (
                SELECT FROM orders
                WHERE status = 'pending' AND EXISTS (SELECT FROM late)
                  AND (SELECT sagas.id FROM sagas WHERE sagas.id = orders.id) IS NULL
                LIMIT $5
            )
            LIMIT $5
        ) AS orders) AS number, (SELECT placed_before FROM late) AS placed_before
        """,
        SagaDirection.FORWARD,
        ends_at,
        *_columns(places),
        limit + 1,
    )
    return LateOrders(min(row["number"], limit), row["placed_before"], has_more=row["number"] > limit)


async def count_sagas(conn: db.Connection) -> dict[str, int]:
    """Return how many unfinished sagas are at a step of each partner; a partner without any is missing."""
    rows = await conn.fetch(
        f"""
        SELECT partner, count(*) AS number FROM sagas JOIN {STEP_PARTNERS} USING (plan_version, step)
        WHERE finished_at IS NULL GROUP BY partner
        """  # noqa: S608 - constants
    )
    return {row["partner"]: row["number"] for row in rows}


async def release(conn: db.Connection, partners: Collection[str], limit: int, plans: Plans = PLANS) -> int:
    """Make up to `limit` sagas that wait at a step of these partners due now. Return how many.

    Like `store.claim`, it skips locked rows, so it cannot deadlock with a batch of runners. A saga that a process runs
    is not touched.
    """
    places = [(version, spec.step) for version, steps in plans.items() for spec in steps if spec.partner in partners]
    status = await conn.execute(
        """
        WITH waiting AS MATERIALIZED (
            SELECT id FROM sagas
            WHERE finished_at IS NULL AND lease_owner IS NULL AND next_attempt_at > (SELECT clock_timestamp())
              AND (plan_version, step) IN (SELECT * FROM unnest($1::smallint[], $2::text[]))
            LIMIT $3 FOR UPDATE SKIP LOCKED
        )
        UPDATE sagas SET next_attempt_at = clock_timestamp() FROM waiting WHERE sagas.id = waiting.id
        """,
        *_columns(places),
        limit,
    )
    return db.affected(status)


async def _lock(conn: db.Connection) -> None:
    """Let one writer at a time decide what is in force. Readers do not wait."""
    await conn.execute("LOCK TABLE partner_pauses IN SHARE ROW EXCLUSIVE MODE")


def _columns(places: Collection[tuple[int, str]]) -> tuple[list[int], list[str]]:
    return [version for version, _ in places], [step for _, step in places]


def _parse(row: Any) -> PartnerPause:
    return PartnerPause(row["partner"], row["paused_at"], row["ends_at"], row["actor"], row["reason"])

"""What an operator may do to a partner: pause every call to it for a time, or resume the calls. Each is recorded.

Orders are taken all the same. A saga that needs the partner waits, forward and backward, without an attempt; deadlines
run on. Every process obeys within `pause_watch.PERIOD_SECONDS`; a call that has started is not interrupted.
"""

from datetime import datetime, timedelta
from enum import StrEnum

from app import db
from app.errors import DatabaseUnavailable, PartnerNotFound
from app.operations import audit
from app.operations.audit import AuditActor
from app.saga import pauses
from app.saga.pauses import LateOrders, PartnerPause
from app.saga.steps import partners


class PartnerAction(StrEnum):
    """What an operator asks for, as the audit log has it."""

    PAUSE = "partner pause"
    RESUME = "partner resume"


class PauseOutcome(StrEnum):
    """The result of an action."""

    PAUSED = "paused"
    REPLACED = "replaced"  # it was paused already; end and reason are new
    RESUMED = "resumed"
    NOT_PAUSED = "not-paused"  # nothing was changed


def require(partner: str) -> str:
    """Return the partner's name. Raises PartnerNotFound."""
    if partner not in (names := partners()):
        raise PartnerNotFound(f"there is no such partner: the partners are {', '.join(names)}")
    return partner


async def preview_pause(pool: db.Pool, partner: str, seconds: float) -> LateOrders | None:
    """Return which orders a pause from now on would reject, and change nothing. Raises PartnerNotFound.

    None: they could not be counted in time.
    """
    require(partner)
    async with db.connection(pool) as conn:
        ends_at = await db.now(conn) + timedelta(seconds=seconds)
    return await find_late(pool, partner, ends_at)


async def find_late(pool: db.Pool, partner: str, ends_at: datetime) -> LateOrders | None:
    """Return which orders a pause until `ends_at` rejects. None: they could not be counted in time.

    With a large backlog the count may take longer than a statement may. It is no part of a pause: that must succeed.
    """
    try:
        async with db.connection(pool) as conn:
            return await pauses.find_late(conn, partner, ends_at)
    except DatabaseUnavailable:
        return None


async def pause(pool: db.Pool, partner: str, seconds: float, actor: AuditActor) -> tuple[PartnerPause, PauseOutcome]:
    """Pause a partner from now on. A pause in force is replaced: its end and its reason are no longer valid.

    Raises PartnerNotFound.
    """
    require(partner)
    async with db.transaction(pool) as conn:
        begun, replaces = await pauses.begin(conn, partner, seconds, actor.name, actor.reason)
        outcome = PauseOutcome.REPLACED if replaces else PauseOutcome.PAUSED
        await audit.record(
            conn, actor, PartnerAction.PAUSE, None, outcome, {"partner": partner, "seconds": round(seconds)}
        )
    return begun, outcome


async def resume(pool: db.Pool, partner: str, actor: AuditActor) -> PauseOutcome:
    """End a partner's pause. The processes then make the sagas due that wait for it. Raises PartnerNotFound."""
    require(partner)
    async with db.transaction(pool) as conn:
        outcome = PauseOutcome.RESUMED if await pauses.end(conn, partner) else PauseOutcome.NOT_PAUSED
        await audit.record(conn, actor, PartnerAction.RESUME, None, outcome, {"partner": partner})
    return outcome

"""Find rows that are past their age limit: I6, by the table of limits that metrics and alerts use too."""

from collections.abc import Collection

from app import db
from app.operations import ages
from app.operations.ages import AgeLimit
from app.operations.verify.findings import MAX_SUSPECTS, Invariant, Suspicion

# While the broker is down, these wait for it and for nothing else.
NEED_BROKER = frozenset({("outbox", "waiting"), ("outbox", "claimed"), ("orders", "without a saga")})


# The next call of a saga may end these states.
CURABLE = tuple(limit for limit in ages.limited() if (limit.table, limit.metric) == ("sagas", "saga_needs_operator"))
INCURABLE = tuple(limit for limit in ages.limited() if limit not in CURABLE)


async def find(pool: db.Pool, limits: Collection[AgeLimit], *, broker_works: bool) -> list[Suspicion]:
    """Return what is past its age limit: the orders of such rows, or the number of rows that belong to no order."""
    found: list[Suspicion] = []
    for limit in limits:
        if broker_works or (limit.table, limit.state) not in NEED_BROKER:
            found += await _find(pool, limit)
    return found


async def _find(pool: db.Pool, limit: AgeLimit) -> list[Suspicion]:
    name = f"{limit.table}: {limit.state}"
    async with db.connection(pool) as conn:
        rows = (await ages.count_overdue(conn, [limit]))[limit.table, limit.state]
        orders = await ages.list_overdue(conn, limit, MAX_SUSPECTS) if rows else []
    age = f" for more than {limit.limit_seconds:g} s" if limit.limit_seconds else ""
    if rows and not orders:
        return [Suspicion(Invariant.I6, name, f"{rows} rows{age}: {limit.note}")]
    return [Suspicion(Invariant.I6, str(order_id), f"{name}{age}: {limit.note}") for order_id in orders]

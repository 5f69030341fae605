"""The counts for operators and metrics: unfinished orders, sagas, the outbox, pools."""

from collections.abc import Mapping

from pydantic import BaseModel

from app import db
from app.messaging import outbox_admin
from app.messaging.facts import OutboxMeasured
from app.observability.signals import Signals
from app.operations import ages, database_stats, outbox
from app.operations.facts import AgesMeasured, DatabaseMeasured
from app.operations.outbox import OutboxCounts
from app.orders import queries as order_queries
from app.saga import queries as saga_queries
from app.saga.facts import SagasMeasured


class SagaCounts(BaseModel):
    """Unfinished sagas, by the status of their orders, and how many of them need an operator."""

    in_flight: dict[str, int]
    oldest_age_seconds: float
    needs_operator: int


class PoolUse(BaseModel):
    """Database connections of this process: open, in use, and the maximum."""

    open: int
    in_use: int
    max: int


class StatsAnswer(BaseModel):
    """The counts of the service. `orders`: unfinished ones, by status."""

    orders: dict[str, int]
    sagas: SagaCounts
    outbox: OutboxCounts
    pools: dict[str, PoolUse]


async def read(pool: db.Pool, pools: Mapping[str, db.Pool]) -> StatsAnswer:
    """Return the counts and the use of `pools`. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        unfinished = await order_queries.unfinished(conn)
        sagas = await saga_queries.measure(conn)
        counts = await outbox.count(conn)
    return StatsAnswer(
        orders={status.value: number for status, number in unfinished.items()},
        sagas=SagaCounts(
            in_flight={status.value: sagas.in_flight.get(status, 0) for status in unfinished},
            oldest_age_seconds=max(0.0, sagas.oldest_age_seconds),
            needs_operator=sagas.needs_operator,
        ),
        outbox=counts,
        pools={name: _use(pool) for name, pool in pools.items()},
    )


async def measure(pool: db.Pool, signals: Signals) -> None:
    """Measure outbox, sagas, ages and the database for the gauges. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        pending, age, parked = await outbox_admin.stats(conn)
        sagas = await saga_queries.measure(conn)
        overdue = await ages.count_overdue(conn, list(ages.gauged()))
        snapshot = await database_stats.oldest_snapshot_age_seconds(conn)
        dead_tuples = await database_stats.dead_tuples(conn)
    signals.emit(OutboxMeasured(pending, age, parked))
    signals.emit(SagasMeasured(sagas.in_flight, sagas.oldest_age_seconds, sagas.needs_operator))
    signals.emit(AgesMeasured(overdue))
    signals.emit(DatabaseMeasured(snapshot, dead_tuples))


def _use(pool: db.Pool) -> PoolUse:
    size = pool.get_size()
    return PoolUse(open=size, in_use=size - pool.get_idle_size(), max=pool.get_max_size())

"""The tally of orders: how many have each status, and what the confirmed ones cost."""

from uuid import UUID

from app.db import Pool
from app.operations.tally import OrderTally, Tally
from app.orders.model import Line, Status
from tests.harness.orders import placed


async def place(pool: Pool, total_minor: int, status: Status) -> UUID:
    order = await placed(pool, lines=(Line("WIDGET", 1, total_minor),))
    await set_status(pool, order.id, status)
    return order.id


async def set_status(pool: Pool, order_id: UUID, status: Status) -> None:
    await pool.execute("UPDATE orders SET status = $2 WHERE id = $1", order_id, status.value)


async def test_counts_and_sums(pool: Pool) -> None:
    """Every order counts under its status, and the totals of the confirmed ones are summed up."""
    tally = OrderTally()
    assert await tally.read(pool) == Tally({}, 0)
    await place(pool, 100, Status.CONFIRMED)
    await place(pool, 20, Status.CONFIRMED)
    await place(pool, 3, Status.REJECTED)
    await place(pool, 4, Status.COMPENSATING)
    found = await tally.read(pool)
    assert found == Tally({Status.CONFIRMED: 2, Status.REJECTED: 1, Status.COMPENSATING: 1}, 120)
    assert found.unfinished == 1


async def test_settled_orders_count_once(pool: Pool) -> None:
    """What is older than every unfinished order is read once; all that came later is read again."""
    tally = OrderTally(settled_seconds=0)
    settled = await place(pool, 100, Status.CONFIRMED)
    unfinished = await place(pool, 20, Status.PENDING)
    await place(pool, 3, Status.CONFIRMED)
    assert await tally.read(pool) == Tally({Status.CONFIRMED: 2, Status.PENDING: 1}, 103)
    await pool.execute("UPDATE orders SET total_minor = total_minor * 1000 WHERE id = $1", settled)
    await set_status(pool, unfinished, Status.CONFIRMED)
    for _ in range(2):
        assert await tally.read(pool) == Tally({Status.CONFIRMED: 3}, 123)

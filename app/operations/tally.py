"""How many orders of all tenants have each status, and what the confirmed ones cost."""

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from app import db
from app.orders.model import FINAL, Status
from app.orders.queries import IS_UNFINISHED
from app.values import immutable

# An order gets its id, and with it its time, before it commits. After so long it has committed, or never will.
SETTLED_SECONDS = 60.0
FIRST = UUID(int=0)

OPEN = f"""
WITH unfinished AS MATERIALIZED (
    SELECT id FROM orders WHERE {IS_UNFINISHED}
)
SELECT id FROM unfinished ORDER BY id LIMIT 1
"""  # noqa: S608 - names of statuses
SUMS = """
SELECT status, id < $2 AS is_settled, count(*) AS orders, sum(total_minor)::bigint AS total_minor
FROM orders WHERE id >= $1 GROUP BY status, is_settled
"""


@immutable
class Tally:
    """The orders of one moment. `confirmed_minor`: the sum of their totals, whatever their currencies are."""

    orders: dict[Status, int]
    confirmed_minor: int

    def count(self, status: Status) -> int:
        """Return how many orders have this status."""
        return self.orders.get(status, 0)

    @property
    def unfinished(self) -> int:
        """Return how many orders have no final status."""
        return sum(number for status, number in self.orders.items() if status not in FINAL)


class OrderTally:
    """Counts orders again and again, and those that cannot change any more only once. One caller at a time.

    `settled_seconds`: how old an order must be for that.
    """

    def __init__(self, settled_seconds: float = SETTLED_SECONDS) -> None:
        self._settled_seconds = settled_seconds
        self._settled_until = FIRST
        self._settled = Tally({}, 0)

    async def read(self, pool: db.Pool) -> Tally:
        """Count the orders. Raises DatabaseUnavailable."""
        async with db.connection(pool) as conn:
            oldest_open = await conn.fetchval(OPEN)
            settled_until = db.first_id(await db.now(conn) - timedelta(seconds=self._settled_seconds))
            if oldest_open is not None:
                settled_until = min(settled_until, UUID(int=oldest_open.int))
            settled_until = max(settled_until, self._settled_until)
            rows = await conn.fetch(SUMS, self._settled_until, settled_until)
        self._settled = _add(self._settled, [row for row in rows if row["is_settled"]])
        self._settled_until = settled_until
        return _add(self._settled, [row for row in rows if not row["is_settled"]])


def _add(tally: Tally, rows: Iterable[Any]) -> Tally:
    orders = Counter(tally.orders)
    confirmed_minor = tally.confirmed_minor
    for row in rows:
        orders[Status(row["status"])] += row["orders"]
        confirmed_minor += row["total_minor"] if row["status"] == Status.CONFIRMED else 0
    return Tally(dict(orders), confirmed_minor)

"""What the overview reads once a second costs the same after a long history."""

from functools import partial

from app.db import Pool
from app.operations import concerns
from tests.harness.history import lived_through
from tests.harness.orders import start_saga
from tests.harness.plans import buffers, full_scans, plans_of
from tests.harness.queues import CONSUMER


async def test_the_cost_does_not_grow_with_history(pool: Pool) -> None:
    """It reads what is unfinished, by partial indexes."""
    await start_saga(pool)
    await pool.execute("ANALYZE")
    first_day = buffers(await plans_of(pool, partial(concerns.read, consumer=CONSUMER)))
    await lived_through(pool, 20_000, "2 days")
    await pool.execute("ANALYZE")
    plans = await plans_of(pool, partial(concerns.read, consumer=CONSUMER))
    assert full_scans(plans) & {"orders", "sagas", "outbox", "inbox"} == set()
    assert buffers(plans) < first_day * 4

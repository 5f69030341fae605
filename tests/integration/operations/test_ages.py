"""Every row past its age limit is counted and listed, and no other row is."""

import pytest

from app.db import Pool
from app.operations import ages
from app.operations.ages import LIMITS, AgeLimit
from tests.harness.ages import put_row

MARGIN_SECONDS = 30.0  # a test must pass even if the machine stops for two seconds
LIMITED = list(ages.limited())


def name_of(limit: AgeLimit) -> str:
    return f"{limit.table} {limit.state}"


@pytest.mark.parametrize("limit", LIMITED, ids=name_of)
async def test_a_row_past_its_limit_is_overdue(pool: Pool, limit: AgeLimit) -> None:
    """It is counted, and its order listed."""
    assert limit.limit_seconds is not None
    order_id = await put_row(pool, limit, limit.limit_seconds + MARGIN_SECONDS)
    async with pool.acquire() as conn:
        assert await ages.count_overdue(conn, [limit]) == {(limit.table, limit.state): 1}
        assert await ages.list_overdue(conn, limit, 10) == ([order_id] if limit.order_id else [])


@pytest.mark.parametrize("limit", [limit for limit in LIMITED if limit.limit_seconds], ids=name_of)
async def test_a_row_within_its_limit_is_not_overdue(pool: Pool, limit: AgeLimit) -> None:
    """Another row of the state is reported only when it is older than the limit."""
    assert limit.limit_seconds is not None
    await put_row(pool, limit, limit.limit_seconds - MARGIN_SECONDS)
    async with pool.acquire() as conn:
        assert await ages.count_overdue(conn, [limit]) == {(limit.table, limit.state): 0}
        assert await ages.list_overdue(conn, limit, 10) == []


async def test_a_listing_is_bounded(pool: Pool) -> None:
    parked = next(limit for limit in LIMITED if limit.state == "parked")
    orders = {await put_row(pool, parked, 1) for _ in range(3)}
    async with pool.acquire() as conn:
        listed = await ages.list_overdue(conn, parked, 2)
    assert len(listed) == 2
    assert set(listed) < orders


async def test_every_table_has_a_row(pool: Pool) -> None:
    """A new table must say who moves its rows on."""
    query = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename <> 'alembic_version'"
    assert {limit.table for limit in LIMITS} == {name for (name,) in await pool.fetch(query)}

"""The service behind PgBouncer, which refuses unknown start-up parameters."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from app import db
from tests.harness.api import serving
from tests.harness.commands import orders
from tests.harness.databases import patient_pool
from tests.harness.poolers import PgBouncer

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
OURS = {
    "application_name": "orders",
    "default_transaction_isolation": "read committed",
    "idle_in_transaction_session_timeout": "10s",
    "jit": "off",
}


@pytest.fixture
async def pooled_url(database_url: str, server_directory: Path) -> AsyncIterator[str]:
    async with PgBouncer(server_directory, database_url) as pooler:
        yield pooler.url


async def shown(conn: db.Connection) -> dict[str, str]:
    return {name: await conn.fetchval("SELECT current_setting($1)", name) for name in OURS}


async def test_orders_are_placed_through_a_session_pooler(pooled_url: str) -> None:
    """Orders can be placed through PgBouncer in session mode."""
    assert await orders("migrate", database_url=pooled_url) == (0, "the schema is current\n", "")
    async with serving(pooled_url) as api:
        answers = [await api.post("/orders", json=LINE, headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].content == answers[1].content
        assert (await api.get("/readyz")).status_code == 200


async def test_every_session_has_our_settings(pooled_url: str) -> None:
    """Every session has the service's settings, and leaves none to the pooler's other clients."""
    for _ in range(2):  # the second pool gets the server's session of the first
        async with patient_pool(pooled_url, 1) as pool:
            for _ in range(2):  # the next user of the connection has them too
                async with db.connection(pool) as conn:
                    assert await shown(conn) == OURS
    stranger = await asyncpg.connect(pooled_url)
    assert not OURS.items() & (await shown(stranger)).items() - {("default_transaction_isolation", "read committed")}
    await stranger.close()

"""What the tests of the saga and of the API work with."""

from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest

from tests.harness.api import serving
from tests.harness.sagas import Stage
from tests.harness.sandboxes import Partners


@pytest.fixture
async def stage(pool: asyncpg.Pool, http: httpx.AsyncClient, partners: Partners) -> Stage:
    return Stage(pool, http, partners)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The service with the role `api`, on the test's own database."""
    async with serving(database_url) as client:
        yield client

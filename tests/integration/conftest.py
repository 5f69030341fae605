"""What the tests of several rooms work with."""

from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest

from tests.harness.api import serving
from tests.harness.proxied import Proxied, proxied_to
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


@pytest.fixture
async def proxied(database_url: str) -> AsyncIterator[Proxied]:
    async with proxied_to(database_url) as proxied:
        yield proxied

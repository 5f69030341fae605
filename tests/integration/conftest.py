"""What the tests of several rooms work with."""

from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool
from chaos.proxy import amqp
from chaos.proxy.proxy import Proxy
from tests.harness.api import serving
from tests.harness.events import Effects
from tests.harness.messages import open_channel
from tests.harness.proxied import Proxied, proxied_to
from tests.harness.sagas import Stage
from tests.harness.sandboxes import Partners


@pytest.fixture
async def stage(pool: Pool, http: httpx.AsyncClient, partners: Partners) -> Stage:
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


@pytest.fixture
async def channel(rabbitmq_url: str) -> AsyncIterator[AbstractChannel]:
    """A channel to the broker itself, which has the topology."""
    async with open_channel(rabbitmq_url) as channel:
        yield channel


@pytest.fixture
async def broker_proxy(rabbitmq_url: str) -> AsyncIterator[Proxy]:
    parts = urlsplit(rabbitmq_url)
    async with Proxy(parts.hostname or "", parts.port or 0, frames=amqp) as proxy:
        yield proxy


@pytest.fixture
async def effects(pool: Pool) -> Effects:
    return await Effects.on(pool)

"""A collector of spans, and the settings of a whole system that sends them."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.harness.otlp import Sink, collecting


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """A collector that keeps what it gets."""
    async with collecting() as lent:
        yield lent


@pytest.fixture
def system(database_url: str, rabbitmq_url: str, http: httpx.AsyncClient) -> dict[str, Any]:
    """The settings of the whole system in one process, with a real broker."""
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), str(http.base_url).rstrip("/"))
    return {"database_url": database_url, "rabbitmq_url": rabbitmq_url, "roles": "api,relay,consumer", **partners}

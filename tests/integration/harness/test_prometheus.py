"""The private Prometheus scrapes a service and evaluates rules."""

from pathlib import Path

import httpx
import pytest

from tests.harness.prometheus import Prometheus


async def test_prometheus_scrapes_a_service(api: httpx.AsyncClient, server_directory: Path) -> None:
    """Queries see its metrics; a bad expression is an error."""
    async with Prometheus(server_directory, [api.base_url.port or 0]) as prometheus:
        await prometheus.wait_for_scrape()
        assert await prometheus.value("orders_placed_total") == 0
        with pytest.raises(ValueError, match="parse error"):
            await prometheus.query("sum by (")

"""From a histogram to a trace: Prometheus keeps the exemplars, and each names a trace that was exported."""

from pathlib import Path

import httpx
import pytest

from tests.harness.api import serving
from tests.harness.otlp import collecting
from tests.harness.prometheus import Prometheus
from tests.harness.wait import AMPLE_SECONDS, wait_until

ORDER = {"sku": "WIDGET", "quantity": 1, "unit_price": 1}
HISTOGRAMS = ("http_server_request_duration_seconds", "saga_duration_seconds", "saga_step_duration_seconds")


async def place(client: httpx.AsyncClient) -> None:
    """Place an order, and wait for its end."""
    order = (await client.post("/orders", json=ORDER)).raise_for_status().json()

    async def is_confirmed() -> bool:
        return bool((await client.get(f"/orders/{order['id']}")).json()["status"] == "confirmed")

    await wait_until(is_confirmed, AMPLE_SECONDS, "the order's end")


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
async def test_exemplars_name_exported_traces(
    database_url: str, sandbox_url: str, server_directory: Path, sampler: str
) -> None:
    """With sampling each histogram has one; without, none has."""
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with collecting() as sink:
        tracing = sink.tracing(traces_sampler=sampler)
        async with (
            serving(database_url, roles="api,relay,consumer", tracing=tracing, **partners) as client,
            Prometheus(server_directory, [client.base_url.port or 0]) as prometheus,
        ):
            await place(client)
            await prometheus.wait_for_scrape("saga_duration_seconds_count == 1")
            found = {name: await prometheus.exemplars(f"{name}_bucket") for name in HISTOGRAMS}
        named = {labels["trace_id"] for exemplars in found.values() for labels in exemplars}
        assert {name for name, exemplars in found.items() if exemplars} == (
            set(HISTOGRAMS) if sampler == "always_on" else set()
        )
        assert named <= {span.trace_id for span in sink.spans}

"""One call that waits is answered with the order's end, whichever process brings it about."""

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import System, client, order
from tests.harness.processes import Service

APART = ({"roles": "relay"}, {"roles": "consumer"}, {"roles": "api"})
ENDS = [(order(), "confirmed"), (order("OUT-OF-STOCK"), "rejected")]


async def ended(service: Service, body: dict[str, Any]) -> httpx.Response:
    """Place an order and read it once, waiting."""
    async with client(service.url) as http:
        placed = (await http.post("/orders", json=body)).raise_for_status()
        return await http.get(placed.headers["location"], headers={"Prefer": "wait=30"})


@pytest.mark.parametrize("processes", [({},), APART], ids=["together", "apart"])
async def test_one_call_that_waits_is_answered_with_the_end_of_a_fresh_order(
    system: System, processes: tuple[dict[str, str], ...]
) -> None:
    *_, service = [await system.start(**roles) for roles in processes]
    for body, status in ENDS:
        answer = await ended(service, body)
        assert (answer.json()["status"], answer.headers["preference-applied"]) == (status, "wait=30")

"""Dead letters in a browser: one is replayed and followed to its end; all are replayed after a dry run."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial

import httpx
import pytest
from playwright.async_api import Page

from app.db import Pool
from tests.harness import brokers
from tests.harness.api import serving
from tests.harness.browser import Visitors, check_axe, no_sideways_scroll
from tests.harness.console import ADMIN_TOKEN, SETTINGS, log_in_by_form
from tests.harness.identity import bearer
from tests.harness.planting import failing_handler
from tests.harness.run import Run
from tests.harness.wait import AMPLE_SECONDS, wait_until

PAGE = "/console/dead-letters"
ORDER = {"items": [{"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}]}
# A message is dead after its first failure.
SERVICE = {"roles": "api,relay,consumer", "inbox_max_attempts": 1, "outbox_poll_seconds": 0.05, **SETTINGS}
REASON = "the constraint is gone"


@pytest.fixture(params=["rabbitmq", "in-process"])
async def service(
    request: pytest.FixtureRequest, database_url: str, sandbox_url: str, run: Run
) -> AsyncIterator[httpx.AsyncClient]:
    """The whole service with each transport."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(brokers.clean(run)) if request.param == "rabbitmq" else ""
        urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
        yield await stack.enter_async_context(serving(database_url, rabbitmq_url=url, **SERVICE, **urls))


async def place_dead(service: httpx.AsyncClient, pool: Pool, number: int) -> list[str]:
    """Place orders while no saga can start; return their ids when all of their events are dead letters."""
    async with failing_handler(pool):
        placed = [(await service.post("/orders", json=ORDER)).raise_for_status().json() for _ in range(number)]
        await wait_until(lambda: are_dead(service, number), AMPLE_SECONDS, "dead letters")
    return [order["id"] for order in placed]


async def are_dead(service: httpx.AsyncClient, number: int) -> bool:
    """Return whether so many letters are dead. A busy machine may not answer in time."""
    answer = await service.get("/ops/dlq", headers=bearer(ADMIN_TOKEN))
    return answer.is_success and answer.json()["depth"] == number


async def all_are_confirmed(pool: Pool) -> None:
    query = "SELECT NOT EXISTS (SELECT FROM orders WHERE status <> 'confirmed')"
    await wait_until(partial(pool.fetchval, query), AMPLE_SECONDS, "end of every order")


async def operator(visitors: Visitors, service: httpx.AsyncClient, *, scripts: bool = True) -> Page:
    page = await visitors.page(str(service.base_url), scripts=scripts)
    await log_in_by_form(page)
    return page


async def test_a_replayed_letter_is_followed_to_its_end(
    visitors: Visitors, service: httpx.AsyncClient, pool: Pool
) -> None:
    """From the navigation to the letter, and from its replay to the confirmed order."""
    page = await operator(visitors, service)
    [order_id] = await place_dead(service, pool, 1)
    await page.get_by_role("link", name="Dead letters").click()
    await page.get_by_role("heading", name=f"Order {order_id}").wait_for()
    await page.locator("#recorded").get_by_text("recorded as dead").wait_for()
    await page.get_by_text("Replay or purge", exact=True).click()
    await check_axe(page)
    await no_sideways_scroll(page)
    await page.get_by_label("Reason").fill(REASON)
    await page.get_by_role("button", name="Replay").click()
    await page.wait_for_url(f"**/console/orders/{order_id}")
    await page.get_by_role("main").get_by_text("confirmed", exact=True).first.wait_for()
    await all_are_confirmed(pool)


async def test_all_are_replayed_after_a_dry_run(visitors: Visitors, service: httpx.AsyncClient, pool: Pool) -> None:
    """One click sends one batch after the other, and shows the progress."""
    page = await operator(visitors, service)
    await place_dead(service, pool, 5)
    await page.goto(PAGE)
    await page.get_by_role("link", name="Replay all").click()
    await page.get_by_text("of 5 would be replayed").wait_for()
    await check_axe(page)
    await no_sideways_scroll(page)
    assert await pool.fetchval("SELECT count(*) FROM inbox WHERE dead_at IS NOT NULL") == 5
    await page.get_by_label("Reason").fill(REASON)
    await page.get_by_label("At a time").fill("2")
    await page.get_by_role("button", name="Replay all").click()
    await page.get_by_text("5 of 5 replayed, 0 left").wait_for()
    await page.get_by_text("All that matched are done.").wait_for()
    await all_are_confirmed(pool)
    actions = await pool.fetch("SELECT counts->>'matched' AS matched FROM operator_actions ORDER BY id")
    assert [row["matched"] for row in actions] == ["2", "2", "1"]


@pytest.mark.parametrize("service", ["in-process"], indirect=True)
async def test_without_scripts_each_batch_is_a_form(visitors: Visitors, service: httpx.AsyncClient, pool: Pool) -> None:
    """The operator sends the next one, by keyboard only."""
    page = await operator(visitors, service, scripts=False)
    await place_dead(service, pool, 3)
    await page.goto(f"{PAGE}/purge")
    assert await page.get_by_role("button", name="Purge all").count() == 0
    await page.get_by_label("At a time").fill("2")
    await page.get_by_label("Reason").fill(REASON)
    await page.keyboard.press("Enter")
    await page.get_by_text("2 of 3 purged, 1 left").wait_for()
    await page.get_by_label("At a time").press("Enter")
    await page.get_by_text("All that matched are done.").wait_for()
    await page.get_by_role("link", name="Show what is left").click()
    await page.get_by_role("heading", name="Purged, and their orders still wait").wait_for()


@pytest.mark.parametrize("service", ["in-process"], indirect=True)
async def test_a_parked_event_is_requeued_from_the_outbox(
    visitors: Visitors, service: httpx.AsyncClient, pool: Pool
) -> None:
    """It appears by itself, while the operator writes the reason, and leads to its order."""
    page = await operator(visitors, service)
    await page.goto("/console/outbox")
    await page.get_by_text("Every event is published.").wait_for()
    [order_id] = await place_dead(service, pool, 1)
    await page.get_by_label("Reason").fill(REASON)
    await check_axe(page)
    await no_sideways_scroll(page)
    await page.get_by_role("button", name=f"Requeue the event of order {order_id}").click()
    await page.wait_for_url(f"**/console/orders/{order_id}")
    await all_are_confirmed(pool)

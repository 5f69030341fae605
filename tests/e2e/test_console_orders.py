"""The orders in a real browser: found by any id, live without disturbing who types, and all of it without scripts."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.e2e.conftest import System, client, order
from tests.harness import console
from tests.harness.browser import NARROW, Visitors, check_axe, no_sideways_scroll
from tests.harness.processes import Service

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
SEARCH = "Find an order by any id"
PAGE = 50


@dataclass
class Shop:
    """A service with its console, and a customer's client."""

    service: Service
    system: System
    customer: httpx.AsyncClient

    async def place(self, key: str, **more: str) -> str:
        """Place an order of the customer `cus_1`; return its id."""
        body, headers = order(customer_id="cus_1", **more), {"Idempotency-Key": key, "traceparent": TRACEPARENT}
        answer = await self.customer.post("/orders", json=body, headers=headers)
        return str(answer.raise_for_status().json()["id"])

    async def enter(self, visitors: Visitors, *, width: int = 1280, scripts: bool = True) -> Page:
        """Log in, and open the orders."""
        page = await visitors.page(self.service.url, width=width, scripts=scripts)
        await console.log_in_by_form(page)
        await page.get_by_role("link", name="Orders", exact=True).last.click()
        await expect(page.get_by_role("heading", name="Orders", level=1)).to_be_visible()
        return page


@pytest.fixture
async def shop(system: System) -> AsyncIterator[Shop]:
    service = await system.start_service({**system.env, **console.ENVIRONMENT})
    async with client(service.url) as http:
        yield Shop(service, system, http)


async def test_an_order_is_found_by_each_of_its_ids(shop: Shop, visitors: Visitors) -> None:
    """Paste an id, press Enter, and the order is there."""
    order_id = await shop.place("the-only-key")
    await shop.system.all_ended()
    pool = shop.system.pool
    tracking_id = await pool.fetchval("SELECT tracking_id FROM orders WHERE id = $1", UUID(order_id))
    payment_id = await pool.fetchval("SELECT reply ->> 'payment_id' FROM saga_steps WHERE reply ? 'payment_id'")
    page = await shop.enter(visitors)
    for text in (order_id, "cus_1", "the-only-key", tracking_id, payment_id, TRACE_ID, TRACEPARENT):
        await page.goto("/console/orders")
        await page.get_by_label(SEARCH).fill(text)
        await page.keyboard.press("Enter")
        await page.wait_for_url(f"**/console/orders/{order_id}")
    other = await shop.place("another-key")
    await page.goto("/console/orders")
    await page.get_by_label(SEARCH).fill("cus_1")
    await page.keyboard.press("Enter")
    await expect(page.locator("tbody").get_by_role("link")).to_have_text([other, order_id])
    await check_axe(page)
    await no_sideways_scroll(page)
    await page.get_by_label(SEARCH).fill("something else")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("Nothing found in the orders of all tenants. Looked for:")).to_be_visible()
    await check_axe(page)
    await no_sideways_scroll(page)


async def test_rows_are_live_and_disturb_nothing(shop: Shop, visitors: Visitors) -> None:
    """A row comes and changes; the half-typed search, its caret, both scrollings and the focus stay."""
    page = await shop.enter(visitors, width=NARROW)
    await expect(page.get_by_text("There are no orders yet.")).to_be_visible()
    placed = await asyncio.gather(*(shop.place(f"key-{number}") for number in range(30)))
    rows = page.locator("tbody tr")
    await expect(rows).to_have_count(len(placed))
    await expect(rows.filter(has_text="confirmed")).to_have_count(len(placed))
    search = page.get_by_label(SEARCH)
    await search.press_sequentially("half-typed")
    await page.keyboard.press("ArrowLeft")
    await page.locator("#rows").evaluate("(box) => box.scrollTo(60, 0)")
    await page.evaluate("scrollTo(0, 100)")
    newest = await shop.place("late", payment_method="pm_card_declined")
    await expect(rows.first).to_contain_text(newest)
    await expect(rows.first).to_contain_text("rejected")
    await expect(rows.first).to_contain_text("refused charge_payment")
    await expect(search).to_have_value("half-typed")
    await expect(search).to_be_focused()
    assert await search.evaluate("(field) => field.selectionStart") == len("half-type")
    assert await page.locator("#rows").evaluate("(box) => box.scrollLeft") == 60
    assert await page.evaluate("scrollY") == 100
    await page.locator(f"#order-{placed[-1]}").focus()
    await shop.place("still-later")
    await expect(rows).to_have_count(len(placed) + 2)
    await expect(page.locator(f"#order-{placed[-1]}")).to_be_focused()


async def test_everything_works_without_scripts(shop: Shop, visitors: Visitors) -> None:
    """Search, tabs, filters and pages are links and forms."""
    await asyncio.gather(*(shop.place(f"key-{number}") for number in range(PAGE + 1)))
    declined = await shop.place("declined", payment_method="pm_card_declined")
    await shop.system.all_ended()
    page = await shop.enter(visitors, scripts=False)
    rows = page.locator("tbody tr")
    await page.get_by_role("link", name="Older").click()
    await expect(rows).to_have_count(2)
    await page.get_by_role("link", name="Newer").click()
    await expect(rows).to_have_count(PAGE)
    await page.get_by_role("link", name="Rejected").click()
    await expect(rows.get_by_role("link")).to_have_text([declined])
    await page.get_by_text("Filters").click()
    await page.get_by_label("Customer").fill("nobody")
    await page.get_by_label("Placed after").fill("2026-01-01T00:00:00")
    await page.get_by_role("button", name="Apply").click()
    await expect(page.get_by_text("No order matches these filters.")).to_be_visible()
    given = parse_qs(urlsplit(page.url).query)
    assert given == {"status": ["rejected"], "customer_id": ["nobody"], "placed_after": ["2026-01-01T00:00"]}
    await page.get_by_role("link", name="Clear").click()
    await expect(rows.get_by_role("link")).to_have_text([declined])
    await page.get_by_label(SEARCH).fill("declined")
    await page.get_by_role("button", name="Search").click()
    await page.wait_for_url(f"**/console/orders/{declined}")

"""All screens of the console, in a real browser: for everybody, and from this host alone."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from fastapi.routing import APIRoute
from playwright.async_api import Page, expect

from app.db import Pool
from app.main import create_app
from app.settings import Settings, load
from tests.e2e.conftest import System, client
from tests.harness import story
from tests.harness.browser import DISCONNECTED, NARROW, Visitors, check_axe, no_sideways_scroll
from tests.harness.console import SETTINGS, log_in_by_form
from tests.harness.operating import pause_partner
from tests.harness.processes import Service
from tests.harness.story import Story
from tests.harness.wait import AMPLE_SECONDS, wait_until

LONG = "x" * 200
WHY = "the constraint is repaired"
TABS = 60  # more than any page needs


def flatten(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """Return every route. FastAPI keeps an included router as one entry that contains its routes."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        yield from flatten(getattr(getattr(route, "original_router", None), "routes", ()))


def screens(database_url: str, told: Story) -> list[str]:
    """Return an address of every page, from the routes, and more of those that look different with other contents."""
    app = create_app(load(Settings, database_url=database_url, roles="api", **SETTINGS))
    paths = [route.path for route in flatten(app.routes) if "GET" in (route.methods or ())]
    pages = [path for path in paths if path.startswith("/console") and "{name}" not in path and "/raw" not in path]
    values = {"order_id": told.kinds, "action": ["replay", "purge"]}
    found = [page for page in pages if "{" not in page]
    for page in pages:
        for name, texts in values.items():
            found += [page.replace(f"{{{name}}}", text) for text in texts if f"{{{name}}}" in page]
    assert not [page for page in pages if "{" in page and not any(f"{{{name}}}" in page for name in values)]
    return [
        *found,
        "/console/orders?stuck=1",
        "/console/orders?status=cancelled&customer_id=nobody",
        f"/console/orders?q={LONG}",
        "/console/outbox?parked=1",
        "/console/audit?who=nobody",
        "/console/nowhere",
        f"/console/nowhere/{LONG}",
    ]


async def check(page: Page) -> None:
    """Check the page as it is now."""
    await check_axe(page)
    await no_sideways_scroll(page)


async def reload_until(page: Page, text: str) -> None:
    """Load a page that is not live until its first heading has this text."""

    async def is_so() -> bool:
        await page.reload()
        return text in await page.get_by_role("heading", level=1).inner_text()

    await wait_until(is_so, AMPLE_SECONDS, text)


async def tab_to(page: Page, name: str) -> None:
    """Press Tab until an element with this text or label has the focus, and the focus can be seen."""
    seen = []
    for _ in range(TABS):
        await page.keyboard.press("Tab")
        label, outline = await page.evaluate(
            "(({labels, innerText}, style) => [labels?.[0]?.innerText ?? innerText, style.outlineStyle])"
            "(document.activeElement, getComputedStyle(document.activeElement))"
        )
        seen.append(label)
        if label.strip() == name:
            assert outline != "none", f"nothing shows that {label!r} has the focus"
            return
    raise AssertionError(f"no way to {name!r} by Tab: {seen}")


async def lose_an_event(system: System) -> tuple[Service, str]:
    """Start a service with its console, and place an order whose event becomes a dead letter; return its id."""
    service = await system.start(**SETTINGS, **story.SETTINGS)
    async with client(service.url) as http:
        return service, await story.lose_event(http, cast("Pool", system.pool))


async def test_every_screen_is_for_everybody(system: System, visitors: Visitors) -> None:
    """axe finds nothing, in light and dark; at 320 px nothing protrudes; nothing comes from elsewhere."""
    service = await system.start(**SETTINGS, **story.SETTINGS)
    async with client(service.url) as http:
        told = await story.tell(http, system.sandbox, cast("Pool", system.pool))
    visitors.expect("status of 4(04|22)")  # of pages that do not exist, and of bad questions
    page = await visitors.page(service.url)
    await page.goto("/console/login?next=/console/audit")
    await check(page)
    await log_in_by_form(page)
    for address in screens(system.env["ORDERS_DATABASE_URL"], told):
        await page.goto(address)
        await check(page)


async def test_everything_can_be_done_without_scripts(system: System, visitors: Visitors) -> None:
    """A support agent finds an order by its customer, replays its event, resumes a partner, and reads the audit log."""
    service, order_id = await lose_an_event(system)
    await pause_partner(cast("Pool", system.pool), "shipping")
    page = await visitors.page(service.url, scripts=False, width=NARROW)
    await log_in_by_form(page)
    await page.get_by_role("link", name="Orders", exact=True).last.click()
    await page.get_by_label("Find an order").fill("cus_haddad")
    await page.get_by_role("button", name="Search").click()
    await page.wait_for_url(f"**/console/orders/{order_id}")
    await page.get_by_label("Reason").fill(WHY)
    await page.get_by_role("button", name="Replay its event").click()
    await reload_until(page, "Waits for shipping")
    await page.get_by_role("link", name="Partners").click()
    await page.get_by_label("Partner", exact=True).select_option("shipping")
    await page.get_by_label("Reason").fill("the carrier is back")
    await page.get_by_role("button", name="Resume").click()
    await page.goto(f"/console/orders/{order_id}")
    await reload_until(page, "Confirmed")
    await page.get_by_role("link", name="Audit").click()
    for text in (WHY, "the carrier is back", "the warehouse burns"):
        await expect(page.get_by_text(text)).to_be_visible()


async def test_everything_can_be_done_by_keyboard(system: System, visitors: Visitors) -> None:
    """From the login to an order that cannot start, and from there to its end, on live pages and without a mouse."""
    service, order_id = await lose_an_event(system)
    page = await visitors.page(service.url)
    await page.goto("/console/login")
    await expect(page.get_by_label("Token")).to_be_focused()
    await page.keyboard.type(SETTINGS["admin_token"])
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/console")
    await tab_to(page, "Skip to content")
    await page.keyboard.press("Enter")
    await tab_to(page, "1 order cannot start")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/console/orders?*")
    await tab_to(page, order_id)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"**/{order_id}")
    await tab_to(page, "Reason")
    await page.keyboard.type(WHY)
    await tab_to(page, "Replay its event")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text(re.compile("Confirmed"))


async def test_a_page_follows_a_restarted_service(system: System, visitors: Visitors) -> None:
    """It says that it is not connected; when the service is back, it shows what is new, without a reload."""
    visitors.expect(DISCONNECTED)
    service = await system.start(**SETTINGS)
    page = await visitors.page(service.url)
    await log_in_by_form(page)
    await page.goto("/console/orders")
    await page.evaluate("window.isSamePage = true")
    await service.kill()
    await page.get_by_text("Reconnecting").wait_for()
    await service.start()
    async with client(service.url) as http:
        order_id = await story.place(http, "cus_new", "WIDGET", 1, "9.99")
    await page.get_by_role("link", name=order_id).wait_for()
    await page.get_by_text("Reconnecting").wait_for(state="hidden")
    assert await page.evaluate("window.isSamePage")


async def test_a_page_whose_session_is_over_leads_to_the_login(system: System, visitors: Visitors) -> None:
    """A live page notices by itself, and comes again after the login."""
    visitors.expect(DISCONNECTED)
    service = await system.start(**SETTINGS)
    page = await visitors.page(service.url)
    await log_in_by_form(page)
    await page.goto("/console/orders?status=pending")
    await page.context.clear_cookies()
    await service.terminate()
    await service.start()
    await page.wait_for_url("**/console/login?next=*")
    await page.get_by_label("Token").fill(SETTINGS["admin_token"])
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/console/orders?status=pending")

"""All screens of the console, in a real browser: for everybody, and from this host alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from fastapi.routing import APIRoute

from app.db import Pool
from app.main import create_app
from app.settings import Settings, load
from tests.e2e.conftest import System, client
from tests.harness import console, story
from tests.harness.browser import DISCONNECTED, Visitors, check_axe, no_sideways_scroll
from tests.harness.processes import Service
from tests.harness.story import Story

LONG = "x" * 200


@dataclass
class Shop:
    """A service with its console, and what has happened there."""

    service: Service
    system: System
    story: Story


@pytest.fixture
async def shop(system: System) -> Shop:
    service = await system.start_service({**system.env, **story.SETTINGS, **console.ENVIRONMENT})
    async with client(service.url) as http:
        told = await story.tell(http, system.sandbox, cast("Pool", system.pool))
    return Shop(service, system, told)


def flatten(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """Return every route. FastAPI keeps an included router as one entry that contains its routes."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        yield from flatten(getattr(getattr(route, "original_router", None), "routes", ()))


def screens(database_url: str, told: Story) -> list[str]:
    """Return an address of every page, from the routes, and more of those that look different with other contents."""
    app = create_app(load(Settings, database_url=database_url, roles="api", **console.SETTINGS))
    paths = [route.path for route in flatten(app.routes) if "GET" in (route.methods or ())]
    pages = [path for path in paths if path.startswith("/console") and "{name}" not in path and "/raw" not in path]
    assert len(pages) > 3
    return [
        *(page.format(order_id=order_id) for page in pages for order_id in told.orders if "{order_id}" in page),
        *(page for page in pages if "{" not in page),
        "/console/nowhere",
        f"/console/nowhere/{LONG}",
    ]


async def test_every_screen_is_for_everybody(shop: Shop, visitors: Visitors) -> None:
    """axe finds nothing, in light and dark; at 320 px nothing protrudes; nothing comes from elsewhere."""
    visitors.expect("status of 404")  # of the page that does not exist
    page = await visitors.page(shop.service.url)
    for address in ("/console/login", "/console/login?next=/console/audit"):
        await page.goto(address)
        await check_axe(page)
        await no_sideways_scroll(page)
    await console.log_in_by_form(page)
    for address in screens(shop.system.env["ORDERS_DATABASE_URL"], shop.story):
        await page.goto(address)
        await check_axe(page)
        await no_sideways_scroll(page)


async def test_a_page_follows_a_restarted_service(shop: Shop, visitors: Visitors) -> None:
    """It says that it is not connected; when the service is back, it shows what is new, without a reload."""
    visitors.expect(DISCONNECTED)
    page = await visitors.page(shop.service.url)
    await console.log_in_by_form(page)
    await page.goto("/console/orders")
    await page.evaluate("window.isSamePage = true")
    await shop.service.kill()
    await page.get_by_text("Reconnecting").wait_for()
    await shop.service.start()
    async with client(shop.service.url) as http:
        order_id = await story.place(http, "cus_new", "WIDGET", 1, "9.99")
    await page.get_by_role("link", name=order_id).wait_for()
    await page.get_by_text("Reconnecting").wait_for(state="hidden")
    assert await page.evaluate("window.isSamePage")

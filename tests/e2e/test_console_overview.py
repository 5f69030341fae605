"""The overview leads an operator to what is wrong, and shows what happens while it happens."""

from typing import cast

from app.db import Pool
from tests.e2e.conftest import System, client
from tests.harness import console, story
from tests.harness.browser import Visitors


async def test_a_stuck_order_is_two_clicks_away(system: System, visitors: Visitors) -> None:
    """Overview, list, order: by links with what is wrong, and by keyboard alone."""
    service = await system.start_service({**system.env, **story.SETTINGS, **console.ENVIRONMENT})
    async with client(service.url) as http:
        told = await story.tell(http, system.sandbox, cast("Pool", system.pool))
    page = await visitors.page(service.url)
    await console.log_in_by_form(page)
    stuck = page.get_by_role("region", name="What is wrong").get_by_role("link", name="stuck")
    await stuck.focus()
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/console/orders?stuck=1")
    await page.locator(f'a[href="/console/orders/{told.stuck}"]').first.click()
    await page.wait_for_url(f"**/console/orders/{told.stuck}")

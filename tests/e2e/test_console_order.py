"""A stuck order in browsers: what an operator types and does is kept, followed to its end, or refused with a reason."""

import re

from playwright.async_api import Page, expect

from tests.e2e.conftest import System, order
from tests.harness.browser import Visitors, check_axe, no_sideways_scroll
from tests.harness.console import SETTINGS, log_in_by_form
from tests.harness.wait import AMPLE_SECONDS, wait_until

WHY = "the customer called, INC-4711"


async def reload_until_offered(page: Page, name: str) -> None:
    """Load a page that is not live until it has the button: a retry is not offered while an attempt is under way."""

    async def offered() -> bool:
        await page.reload()
        return await page.get_by_role("button", name=name).is_visible()

    await wait_until(offered, AMPLE_SECONDS, f"the button {name}")


async def test_a_stuck_order_is_compensated_and_followed_to_its_end(system: System, visitors: Visitors) -> None:
    """The page keeps a half-typed reason, and shows each undo without being loaded again.

    The second operator's browser runs no scripts. Its page still has the button, and the refusal says why.
    """
    await system.faults({"target": "payment.charge", "kind": "error"})
    service = await system.start(**SETTINGS)
    placed = await system.place([service], "stuck", order())
    page, late = await visitors.page(service.url), await visitors.page(service.url, scripts=False)
    for opened in (page, late):
        await log_in_by_form(opened)
        await opened.goto(f"/console/orders/{placed.json()['id']}")
    await reload_until_offered(late, "Retry now")
    await late.get_by_label("Reason").fill(WHY)

    heading, reason = page.get_by_role("heading", level=1), page.get_by_label("Reason")
    await expect(heading).to_have_text(re.compile("Waits for payment"))
    await reason.fill(WHY)
    await reason.press("Enter")  # does nothing: the operator has to choose a button
    await expect(page.get_by_text(re.compile("more attempts"))).to_be_visible()
    await expect(reason).to_have_value(WHY)
    await check_axe(page)
    await no_sideways_scroll(page)

    await page.get_by_role("button", name="Compensate").click()
    await expect(heading).to_have_text(re.compile("Rejected after .*an operator ended it"))
    steps = [
        f"compensate asked .* by admin-token: {WHY}",
        "charge_payment undone",
        "reserve_inventory undone",
        "rejected",
    ]
    await expect(page.locator("#followed")).to_have_text(re.compile(".*".join(steps), re.DOTALL))
    await expect(page.get_by_role("heading", name="Actions")).to_be_hidden()
    await check_axe(page)
    await no_sideways_scroll(page)

    visitors.expect("409")
    await late.get_by_role("button", name="Retry now").click()
    await expect(late.get_by_text("The order is rejected.")).to_be_visible()
    await late.get_by_role("link", name="Back to the page").click()
    await expect(late.locator("#followed")).to_have_text(
        re.compile("nothing was changed: it had ended, or not started")
    )
    await system.all_ended()
    assert await system.violations() == []


async def test_a_reason_is_kept_while_attempts_come_and_go(system: System, visitors: Visitors) -> None:
    """A compensating order offers a retry between two attempts only; the field stays, with its text and the focus."""
    await system.faults({"target": "payment.refund", "kind": "timeout_before"})
    slow = {"saga_lease_seconds": "30", "partner_timeout_seconds": "2"}
    seldom = {"partner_retry_base_seconds": "4", "partner_retry_cap_seconds": "4"}
    service = await system.start(**SETTINGS, **slow, **seldom)
    placed = await system.place([service], "undeliverable", order("UNDELIVERABLE"))
    page = await visitors.page(service.url)
    await log_in_by_form(page)
    await page.goto(f"/console/orders/{placed.json()['id']}")
    nothing, reason = page.get_by_text("Nothing just now: it is under way."), page.get_by_label("Reason")
    await expect(nothing).to_be_visible()
    await reason.fill(WHY)
    await expect(page.get_by_role("button", name="Retry now")).to_be_visible()
    await expect(nothing).to_be_visible()
    await expect(reason).to_be_focused()
    await expect(reason).to_have_value(WHY)
    await system.faults()
    await system.all_ended()
    await expect(page.get_by_role("heading", name="Actions")).to_be_hidden()
    assert await system.violations() == []

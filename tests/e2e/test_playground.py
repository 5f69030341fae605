"""The playground of the demo: what its buttons break, what it shows of it, and whom it refuses."""

import asyncio
import re

import httpx
from playwright.async_api import Page, expect
from uuid_utils.compat import uuid7

from tests.e2e.conftest import SETTINGS, StartDemo, client
from tests.harness.browser import Visitors, check_axe, no_sideways_scroll
from tests.harness.playground import find_address, playing
from tests.harness.processes import Service

# A killed process's work is taken over sooner than in a demo that people watch.
HASTE = {name: value for name, value in SETTINGS.items() if "LEASE" in name or "TIMEOUT" in name}
BALANCED = "balanced What was charged"
ALL_HOLD = [f"I{number}" for number in range(1, 10)]


def service_url(demo: Service) -> str:
    found: str = re.findall(r"orders service +(http://\S+)", demo.log.read_text())[0]
    return found


def sandbox_url(demo: Service) -> str:
    found: str = re.findall(r"sandbox +(http://\S+)", demo.log.read_text())[0]
    return found


async def test_orders_outlive_a_kill(start_demo: StartDemo) -> None:
    """After kill -9 during 50 orders, all end, the ledger balances on screen, and every invariant holds."""
    demo = await start_demo(**HASTE)
    async with playing(demo) as playground:
        await asyncio.gather(playground.pressed("place:50"), playground.pressed("break:kill"))
        await playground.until_shown(
            "events", "killed by SIGKILL", "The service runs again", "50 orders have their 201s"
        )
        await playground.until_shown("ledger", BALANCED, "Orders confirmed 50", "Shipments 50", "Units held 0")
        assert "Service running" in await playground.fragment("system")
        verdicts = await playground.until_shown("invariants", "50 orders of the last hour judged")
        assert re.findall(r"(I\d) [a-z0-9, ]+ holds", verdicts) == ALL_HOLD


async def test_frozen_and_lost_come_back(start_demo: StartDemo) -> None:
    """A frozen service and a lost PostgreSQL are shown as such, come back by themselves, and lose no order."""
    demo = await start_demo(**HASTE)
    async with playing(demo) as playground:
        await asyncio.gather(playground.pressed("place:50"), playground.pressed("break:lose-postgres"))
        await playground.pressed("break:freeze")
        shown = await playground.until_shown("system", "PostgreSQL down", "back in", "Service frozen", "continues in")
        assert "restarted" not in shown
        await playground.until_shown("ledger", "not checked PostgreSQL does not answer")
        await playground.until_shown("invariants", "I1 a 201 means a durable order and event not checked")
        await playground.until_shown("stock", "Not current: PostgreSQL does not answer")
        await playground.until_shown("system", "PostgreSQL running", "restarted once", "Service running")
        await playground.until_shown("events", "PostgreSQL runs again", "The service continues")
        await playground.until_shown("ledger", BALANCED, "Orders confirmed 50")


async def test_repair_brings_back_at_once(start_demo: StartDemo) -> None:
    """“Repair everything” does not wait for the end of a freeze, and ends the faults of the partners."""
    demo = await start_demo(**HASTE)
    async with playing(demo) as playground:
        assert "After 1.5 s the leases" in (await playground.http.get("/")).text
        await playground.pressed("break:payment-down", "place:1", "break:freeze")
        assert "Payment partner down" in await playground.fragment("faults")
        assert "pending" in await playground.fragment("orders")
        assert "Service frozen" in await playground.fragment("system")
        await playground.pressed("repair")
        assert "Service running" in await playground.fragment("system")
        assert await playground.fragment("faults") == ""
        await playground.until_shown("orders", "confirmed")


async def test_faults_of_partners(start_demo: StartDemo) -> None:
    """A declined card rejects one order, a lost answer charges no card twice, and no fault is set twice."""
    demo = await start_demo(**HASTE)
    async with playing(demo) as playground, client(sandbox_url(demo)) as sandbox:
        await playground.pressed("break:decline", "place:1")
        await playground.until_shown("orders", "rejected card-declined")
        await playground.pressed("break:shipping-slow", "break:shipping-slow")
        assert [rule["target"] for rule in (await sandbox.get("/faults")).json() if rule["times"] != 0] == [
            "shipping.create"
        ]
        await playground.pressed("break:lose-answer", "stop:shipping-slow", "place:1")
        await playground.until_shown("ledger", BALANCED, "Charged 3.20", "Refunded 0.00", "Orders confirmed 1")
        assert await playground.fragment("faults") == ""


async def test_shows_a_wrong_ledger(start_demo: StartDemo) -> None:
    """A charge that belongs to no order makes the ledger not balanced, and I5 violated."""
    demo = await start_demo()
    saga = str(uuid7())
    body = {"saga_id": saga, "amount_minor": 999, "currency": "USD", "payment_method": None}
    async with playing(demo) as playground, client(sandbox_url(demo)) as sandbox:
        await playground.pressed("place:1")
        await playground.until_shown("ledger", BALANCED)
        key = {"Idempotency-Key": f"{saga}:charge_payment"}
        (await sandbox.post("/v1/payments/charge", json=body, headers=key)).raise_for_status()
        await playground.until_shown("ledger", "not balanced")
        await playground.until_shown("invariants", "I5 charged is what the order costs, or nothing violated", saga)


async def test_one_key_makes_one_order(start_demo: StartDemo) -> None:
    """One key that is sent 20 times at once makes one order, and gets the same answer each time."""
    demo = await start_demo()
    async with playing(demo) as playground, client(service_url(demo)) as http:
        await playground.pressed("one-key")
        events = await playground.until_shown("events", "and made one order")
        assert "got 20 answers, all the same, byte for byte" in events
        orders = (await http.get("/orders")).json()["orders"]
        assert [order["id"] for order in orders] == re.findall(r"made one order (\S+)", events)


async def test_an_undo_that_keeps_failing(start_demo: StartDemo) -> None:
    """A saga that needs an operator, and goes on needing one, violates I6."""
    demo = await start_demo(**HASTE, ORDERS_SAGA_NEEDS_OPERATOR_SECONDS="1")
    rules = [
        {"target": "shipping.create", "kind": "refuse"},
        {"target": "payment.refund", "kind": "error"},
    ]
    async with playing(demo) as playground, client(sandbox_url(demo)) as sandbox:
        (await sandbox.put("/faults", json=rules)).raise_for_status()
        await playground.pressed("place:1")
        await playground.until_shown("invariants", "I6 nothing is past its age limit violated", "undo fails")


async def test_counts_refused_orders(start_demo: StartDemo) -> None:
    """Orders that the service refuses are not counted as placed, and one event has all of them."""
    demo = await start_demo(ORDERS_AUTH_MODE="jwt", ORDERS_AUTH_JWT_SECRET="x" * 32)
    async with playing(demo) as playground:
        await playground.pressed("place:3", "one-key")
        events = await playground.until_shown("events", "One key")
        assert "0 orders have their 201s" in events
        assert "; 3 got 401" in events
        assert "at once, made no order; 20 got 401" in events


async def test_refuses_everybody_else(start_demo: StartDemo) -> None:
    """Only a browser with the session, on the supervisor's own address and from its own page, breaks anything."""
    demo = await start_demo()
    wrong = "http://attacker.example"
    async with playing(demo) as playground, client(playground.origin) as stranger:
        for path in ("/", "/?token=wrong"):
            page = await stranger.get(path)
            assert page.status_code == httpx.codes.UNAUTHORIZED
            assert "Open the address that the demo printed" in page.text
        assert (await stranger.get("/?stream=1")).text == "event: expired\ndata: \n\n"
        assert list(playground.http.cookies) == [f"orders_playground_{httpx.URL(playground.origin).port}"]
        form = {"form_token": playground.form_token, "do": "break:kill"}
        without_cookie = await stranger.post("/", data=form, headers={"Origin": playground.origin})
        assert without_cookie.status_code == httpx.codes.UNAUTHORIZED
        for headers in (
            {"Origin": wrong},
            {"Origin": "null"},
            {"Origin": wrong, "Host": "attacker.example"},  # a name of its own that leads here
        ):
            assert (await playground.press("break:kill", **headers)).status_code == httpx.codes.FORBIDDEN
        for button in ("", "place:0", "place:1001", "place:x", "break:all", "stop:", "sing"):
            assert (await playground.press(button)).status_code == httpx.codes.BAD_REQUEST
        own_name = {"Host": "attacker.example"}
        for address in ("/", find_address(demo)):
            assert (await playground.http.get(address, headers=own_name)).status_code == httpx.codes.FORBIDDEN
        playground.form_token = "wrong"
        assert (await playground.press("break:kill")).status_code == httpx.codes.FORBIDDEN
        assert "Nothing yet" in await playground.fragment("events")


async def press(page: Page, name: str) -> None:
    await page.get_by_role("button", name=name, exact=True).click()


async def test_journey(start_demo: StartDemo, visitors: Visitors) -> None:
    """From the first page of the demo: break it during orders, watch it recover, and place one without scripts."""
    demo = await start_demo(**HASTE)
    page = await visitors.page(service_url(demo))
    await page.goto("/")
    await expect(page).to_have_url(f"{service_url(demo)}/console")
    await page.get_by_role("link", name="Playground").click()
    ledger, system, events = (page.locator(f"#{name}") for name in ("ledger", "system", "events"))
    await expect(page.get_by_text("Start here")).to_be_visible()
    await press(page, "10 orders")
    await press(page, "Kill the service")
    await expect(events).to_contain_text("The service ended (killed by SIGKILL)")
    await expect(page.locator("#orders tbody tr")).to_have_count(10)
    await expect(system).to_contain_text("restarted once")
    await expect(ledger).to_contain_text(re.compile("each is shipped once.*Shipments\\s*10", re.DOTALL))
    await press(page, "Payment partner down")
    await expect(page.locator("#faults")).to_contain_text("Payment partner down")
    await check_axe(page)
    await no_sideways_scroll(page)
    await press(page, "Bring it back")
    await expect(page.locator("#faults")).to_be_empty()
    await expect(page.locator("#orders a").first).to_have_attribute("href", re.compile(r"/console/orders/"))

    plain = await visitors.page(service_url(demo), scripts=False)
    await plain.goto("/")
    await plain.get_by_role("link", name="Playground").click()
    await press(plain, "1 order")
    await expect(plain.locator("#events")).to_contain_text("1 order has its 201")

"""The page of one order: what it shows to whom, and what an operator can do there."""

import html
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.db import Pool
from app.operations import timeline
from app.operations.saga_views import SagaAnswer
from app.operations.timeline import TimelineAnswer
from app.orders.model import Line
from tests.harness import console
from tests.harness.api import serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.operating import audit_rows
from tests.harness.orders import placed, start_saga
from tests.harness.queues import CONSUMER
from tests.harness.sagas import Stage
from tests.harness.sandboxes import set_faults

WHY = "INC-4711 <script>alert(1)</script>"
HOSTILE = "<script>alert('x')</script>"
BUTTON = re.compile(r'name="action" value="([a-z]+)"')


@pytest.fixture
async def operator(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator who has logged in."""
    async with serving(database_url, **console.SETTINGS) as client:
        await console.log_in(client)
        yield client


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A reader of the tenant `acme`, who has logged in."""
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, console="true") as client:
        await console.log_in(client, token(scope="orders:read"))
        yield client


def page_of(order_id: object) -> str:
    return f"/console/orders/{order_id}"


async def shown(client: httpx.AsyncClient, order_id: object) -> str:
    return (await client.get(page_of(order_id))).raise_for_status().text


async def ask(client: httpx.AsyncClient, action: str, order_id: object, /, **fields: str) -> httpx.Response:
    """Send the form of an order's page with this button."""
    return await console.change(
        client, page_of(order_id), {"action": action, "reason": WHY, **fields}, page_of(order_id)
    )


def assert_done(answer: httpx.Response, order_id: object) -> None:
    assert (answer.status_code, answer.headers.get("location")) == (303, page_of(order_id)), answer.text


def words(page: str) -> str:
    """Return the text of a page, without its elements."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


async def make_wait(stage: Stage, saga: UUID) -> None:
    """Let the saga's charge fail, and its next attempt be in an hour."""
    await set_faults(stage.http, {"target": "payment.charge", "kind": "error"})
    await stage.orchestrator().run_once()
    await stage.pool.execute(
        "UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour' WHERE id = $1", saga
    )
    await set_faults(stage.http)


async def park(pool: Pool, order_id: UUID) -> None:
    await pool.execute(
        "UPDATE outbox SET parked_at = clock_timestamp(), attempts = 10, last_error = $2 WHERE id = $1",
        order_id,
        HOSTILE,
    )


async def test_a_waiting_order_says_why_and_offers_what_helps(operator: httpx.AsyncClient, stage: Stage) -> None:
    """The headline is the reason; the picture has what is done, what happens now, and what is to come."""
    saga = await start_saga(stage.pool, customer_id="cus_7")
    await make_wait(stage, saga)
    page = await shown(operator, saga)
    text = words(page)
    assert "Waits for payment pending Payment failed charge_payment (attempt 1): no clear answer" in text
    assert "Total 29.97 USD Customer cus_7 Tenant default" in text
    assert re.search(r"reserve_inventory done .* charge_payment unknown .* now Waits for payment", text)
    assert "to come commit_inventory to come create_shipment" in text
    assert re.search(r'<rect class="done" x="[0-9.]+%"', page)
    assert BUTTON.findall(page) == ["retry", "compensate", "cancel"]
    reservation = await stage.pool.fetchval("SELECT reply ->> 'reservation_id' FROM saga_steps WHERE reply IS NOT NULL")
    assert f"Reservation {reservation}" in text


async def test_a_retry_is_recorded_and_followed_to_its_end(operator: httpx.AsyncClient, stage: Stage) -> None:
    """The line begins with who asked and why, and ends with the end of the order."""
    saga = await start_saga(stage.pool)
    await make_wait(stage, saga)
    assert_done(await ask(operator, "retry", saga), saga)
    await stage.orchestrator().run_once()
    page = await shown(operator, saga)
    text = words(page)
    assert "Confirmed in" in text
    line = text[text.index("retry asked") : text.index("Actions")]
    steps = r"charge_payment done [\d:]+ commit_inventory done [\d:]+ create_shipment done [\d:]+ confirmed [\d:]+"
    assert re.fullmatch(rf"retry asked [\d:]+ by admin-token: {re.escape(WHY)} {steps}", line.strip())
    assert await audit_rows(stage.pool) == [("admin-token", "retry", saga, WHY, "due")]
    [audit] = re.findall(r'href="(/console/audit[^"]*)"', page.partition("<main")[2])
    assert WHY in words((await operator.get(audit)).raise_for_status().text)


async def test_a_compensated_order_ends_rejected(operator: httpx.AsyncClient, stage: Stage) -> None:
    """Everything is undone, the reason is the operator's, and nothing is offered any more."""
    saga = await start_saga(stage.pool)
    await make_wait(stage, saga)
    assert_done(await ask(operator, "compensate", saga), saga)
    assert BUTTON.findall(await shown(operator, saga)) == []
    await stage.drive()
    page = await shown(operator, saga)
    assert "an operator ended it rejected Everything that was done for it is undone." in words(page)
    assert "charge_payment undone" in words(page)
    assert WHY not in page
    assert await stage.outcome(saga) == "rejected: compensated-by-operator"
    assert await audit_rows(stage.pool) == [("admin-token", "compensate", saga, WHY, "turns-back")]


async def test_a_cancel_ends_as_the_customers_own(operator: httpx.AsyncClient, stage: Stage) -> None:
    """With a saga it ends cancelled when all is undone; without one at once, and the process counts it."""
    saga, unstarted = await start_saga(stage.pool), (await placed(stage.pool)).id
    await make_wait(stage, saga)
    assert "Its saga never starts." in await shown(operator, unstarted)
    for order_id in (saga, unstarted):
        assert_done(await ask(operator, "cancel", order_id), order_id)
    await stage.drive()
    for order_id in (saga, unstarted):
        assert await stage.outcome(order_id) == "cancelled: cancelled-by-customer"
    counted = 'orders_finished_total{reason="cancelled-by-customer",status="cancelled"} 1.0'
    assert counted in (await operator.get("/metrics")).text
    assert await audit_rows(stage.pool) == [
        ("admin-token", "cancel", saga, WHY, "turns-back"),
        ("admin-token", "cancel", unstarted, WHY, "cancelled"),
    ]


async def test_a_parked_event_is_requeued(operator: httpx.AsyncClient, stage: Stage) -> None:
    """Its page offers that first. A second time there is nothing parked, and the answer says so."""
    order_id = (await placed(stage.pool)).id
    await park(stage.pool, order_id)
    page = await shown(operator, order_id)
    assert BUTTON.findall(page) == ["requeue", "compensate", "cancel"]
    assert f"it was refused too often ({html.escape(HOSTILE, quote=False)})" in page.replace("&#39;", "'")
    assert_done(await ask(operator, "requeue", order_id), order_id)
    assert await stage.pool.fetchval("SELECT parked_at IS NULL AND attempts = 0 FROM outbox")
    refused = await ask(operator, "requeue", order_id)
    assert (refused.status_code, "No event of the order is parked" in refused.text) == (409, True)
    assert [row[1] for row in await audit_rows(stage.pool)] == ["outbox requeue"]


async def test_a_purged_event_is_replayed(operator: httpx.AsyncClient, stage: Stage) -> None:
    """It is sent again from the outbox. Once the saga has started, the answer says that there is nothing."""
    order_id = (await placed(stage.pool)).id
    await stage.pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
    await stage.pool.execute(
        "INSERT INTO inbox (consumer, message_id, attempts, dead_at, purged_at)"
        " VALUES ($1, $2, 7, clock_timestamp(), clock_timestamp())",
        CONSUMER,
        str(order_id),
    )
    assert BUTTON.findall(await shown(operator, order_id)) == ["replay", "compensate", "cancel"]
    assert_done(await ask(operator, "replay", order_id), order_id)
    assert await stage.pool.fetchval("SELECT published_at IS NULL FROM outbox")
    assert "dlq replay asked" in await shown(operator, order_id)
    saga = await start_saga(stage.pool)
    refused = await ask(operator, "replay", saga)
    assert (refused.status_code, "has no dead letter" in refused.text) == (409, True)
    assert "nothing was changed: no message matched" in await shown(operator, saga)
    assert [row[4] for row in await audit_rows(stage.pool)] == ["done", "nothing-matched"]


async def test_a_parked_dead_letter_is_replayed(operator: httpx.AsyncClient, stage: Stage) -> None:
    """Without a broker, an event that failed too often is parked. A replay resets its attempts; a requeue would not."""
    order_id = (await placed(stage.pool)).id
    await park(stage.pool, order_id)
    await stage.pool.execute(
        "INSERT INTO inbox (consumer, message_id, attempts, dead_at) VALUES ($1, $2, 7, clock_timestamp())",
        CONSUMER,
        str(order_id),
    )
    page = await shown(operator, order_id)
    assert BUTTON.findall(page) == ["replay", "compensate", "cancel"]
    assert f"orders dlq replay --id {order_id}" in page
    assert_done(await ask(operator, "replay", order_id), order_id)
    assert await stage.pool.fetchval("SELECT parked_at IS NULL AND attempts = 0 FROM outbox")
    assert await stage.pool.fetchval("SELECT attempts = 0 AND dead_at IS NULL FROM inbox")


async def test_a_refused_action_says_why_and_leads_back(operator: httpx.AsyncClient, stage: Stage) -> None:
    """A page that was loaded before the order ended still has the buttons; the refusal is recorded."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    operator.headers["Referer"] = f"{operator.base_url}{page_of(saga)}"
    for action in ("retry", "compensate", "cancel"):
        refused = await ask(operator, action, saga)
        assert (refused.status_code, "The order is confirmed." in refused.text) == (409, True)
        assert f'<a href="{page_of(saga)}">Back to the page</a>' in refused.text
    assert [row[4] for row in await audit_rows(stage.pool)] == ["refused"] * 3
    assert "nothing was changed: it had ended, or not started" in await shown(operator, saga)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"reason": "  "}, 422),
        ({"reason": "two\nlines"}, 422),
        ({"reason": "x" * 501}, 422),
        ({"action": "purge"}, 422),
        ({"action": ""}, 422),
        ({"form_token": "of another session"}, 403),
    ],
)
async def test_a_bad_form_changes_nothing(
    operator: httpx.AsyncClient, stage: Stage, fields: dict[str, str], status: int
) -> None:
    """Without a good reason, a known action and the session's token, nothing happens."""
    saga = await start_saga(stage.pool)
    if "form_token" in fields:
        answer = await console.send(operator, page_of(saga), {"action": "cancel", "reason": WHY, **fields})
    else:
        answer = await ask(operator, "cancel", saga, **fields)
    assert answer.status_code == status
    assert await audit_rows(stage.pool) == []
    assert await stage.pool.fetchval("SELECT cancel_requested_at FROM orders") is None


async def test_a_reader_sees_its_tenants_orders_without_actions(reader: httpx.AsyncClient, stage: Stage) -> None:
    """It sees what the timeline shows, no ids of partners, and cannot change anything. Others' orders do not exist."""
    mine, other = await start_saga(stage.pool, tenant="acme"), await start_saga(stage.pool, tenant="other")
    await stage.drive()
    page = await shown(reader, mine)
    assert "Confirmed in" in page
    assert BUTTON.findall(page) == []
    for hidden in ("Actions", "Tenant", "Payment", "Reservation", "pay_"):
        assert hidden not in page
    raw = TimelineAnswer.model_validate((await reader.get(f"{page_of(mine)}/raw")).json(), strict=True)
    assert raw == await timeline.read(stage.pool, mine, "acme", CONSUMER)
    answer = await ask(reader, "compensate", mine)
    assert answer.status_code == 403
    for path in (page_of(other), f"{page_of(other)}/raw", page_of(uuid4())):
        answer = await reader.get(path)
        assert (answer.status_code, "There is no order" in answer.text) == (404, True)
    assert await audit_rows(stage.pool) == []


async def test_the_raw_answer_is_that_of_the_route(operator: httpx.AsyncClient, stage: Stage) -> None:
    """An operator gets the JSON of `GET /ops/sagas/{id}`."""
    saga = await start_saga(stage.pool)
    await stage.drive()
    raw = await operator.get(f"{page_of(saga)}/raw")
    assert raw.headers["content-type"] == "application/json"
    route = await operator.get(f"/ops/sagas/{saga}", headers=bearer(console.ADMIN_TOKEN))
    assert without_age(raw.json()) == without_age(route.json())
    SagaAnswer.model_validate(raw.json(), strict=True)


def without_age(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "saga": {**answer["saga"], "age_seconds": None}}


async def test_hostile_text_is_only_text(operator: httpx.AsyncClient, stage: Stage) -> None:
    """What customers, partners and operators write is escaped. Metadata, address and payment method are not shown."""
    secret = {"metadata": {"note": "in-the-metadata"}, "payment_method": "pm_card_secret"}
    lines = (Line(HOSTILE, 1, 100),)
    saga = await start_saga(stage.pool, customer_id=HOSTILE, lines=lines, **secret)
    await make_wait(stage, saga)
    await stage.pool.execute("UPDATE saga_steps SET detail = $1 WHERE outcome = 'unknown'", HOSTILE)
    assert_done(await ask(operator, "retry", saga, reason=HOSTILE), saga)
    page = await shown(operator, saga)
    assert "<script>alert" not in page
    assert words(page).count(HOSTILE) >= 4
    for hidden in ("in-the-metadata", "pm_card_secret"):
        assert hidden not in page


async def test_hundreds_of_attempts_stay_readable(operator: httpx.AsyncClient, stage: Stage) -> None:
    """Many failed attempts are one row between the first and the last ones."""
    saga = await start_saga(stage.pool)
    await make_wait(stage, saga)
    await stage.pool.execute(
        """
        INSERT INTO saga_steps (saga_id, at, step, action, attempt, outcome, detail, started_at)
        SELECT $1, clock_timestamp() + attempt * interval '10 s', 'charge_payment', 'do', attempt, 'unknown',
               'HTTP 503', clock_timestamp() + attempt * interval '10 s' - interval '1 s'
        FROM generate_series(2, 400) AS attempt
        """,
        saga,
    )
    page = await shown(operator, saga)
    assert "charge_payment, 397 more attempts" in page
    assert "397 × unknown (HTTP 503)" in page
    assert len(page) < 50_000


async def test_the_stream_sends_what_has_changed(operator: httpx.AsyncClient, stage: Stage) -> None:
    """The headline of a watched page follows the order to its end."""
    saga = await start_saga(stage.pool)
    page = await shown(operator, saga)
    found = re.search(r'data-stream="([^"]+)"', page)
    assert found
    async with operator.stream("GET", html.unescape(found[1])) as stream:
        lines = stream.aiter_lines()
        first = await anext(line async for line in lines if '"id": "headline"' in line)
        assert "In progress" in first
        await stage.drive()
        last = await anext(line async for line in lines if '"id": "headline"' in line)
    assert "Confirmed in" in last

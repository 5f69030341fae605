"""The console's dead letters: what they are, what a replay would do, and both actions, on one letter and on many."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.db import Pool
from app.messaging import inbox
from chaos.proxy import amqp
from chaos.proxy.faults import Lose
from chaos.proxy.proxy import Proxy
from tests.harness import brokers
from tests.harness.api import serving
from tests.harness.console import SETTINGS, change, log_in
from tests.harness.console_letters import Desk, at_desk, park, record_dead
from tests.harness.dead_letters import REASON, holds, scan, set_aside
from tests.harness.events import event
from tests.harness.identity import SECRET, token
from tests.harness.operating import audit_rows
from tests.harness.queues import CONSUMER, QUEUE
from tests.harness.run import Run

PAGE = "/console/dead-letters"
ASKED = {"reason": "the bug is fixed"}
REPLAYED = "is tried again, with all attempts"
ISSUED = {"auth_mode": "jwt", "auth_jwt_secret": SECRET}
LETTER = '<li class="panel">'


@pytest.fixture(params=["rabbitmq", "in-process"])
async def desk(request: pytest.FixtureRequest, database_url: str, pool: Pool, run: Run) -> AsyncIterator[Desk]:
    """An operator's desk with each transport."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(brokers.clean(run)) if request.param == "rabbitmq" else ""
        yield await stack.enter_async_context(at_desk(database_url, pool, url))


@pytest.fixture
async def local_desk(database_url: str, pool: Pool) -> AsyncIterator[Desk]:
    """A desk without a broker."""
    async with at_desk(database_url, pool) as desk:
        yield desk


@pytest.fixture
async def broker_desk(database_url: str, pool: Pool, rabbitmq_url: str) -> AsyncIterator[Desk]:
    """A desk with RabbitMQ."""
    async with at_desk(database_url, pool, rabbitmq_url) as desk:
        yield desk


async def test_a_letter_says_why_and_what_a_replay_would_do(desk: Desk) -> None:
    """Reason, inbox, effect and order are shown; what is recorded is live, and a look changes nothing."""
    orders = await desk.plant(2)
    page = await desk.page(PAGE)
    assert page.count(LETTER) == page.count(REPLAYED) == 2
    assert all(f'href="/console/orders/{order.id}"' in page for order in orders)
    assert f"failed once, last error: {REASON}" in page
    assert re.search(r'id="recorded">\s*<div class="figure bad">2</div>', page)
    async with desk.client.stream("GET", f"{PAGE}?stream=1") as stream:
        events = [line async for line in _until(stream, '"recorded"')]
    assert len(events) == 1
    assert await desk.left() == [str(order.id) for order in orders]


async def test_a_replayed_letter_leads_to_its_order(desk: Desk) -> None:
    """Only this letter is replayed, and the reason is recorded."""
    first, second = await desk.plant(2)
    answer = await change(desk.client, f"{PAGE}/replay", {"id": str(second.id), **ASKED}, PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/console/orders/{second.id}")
    assert await audit_rows(desk.pool) == [("admin-token", "dlq replay", second.id, ASKED["reason"], "done")]
    assert await desk.left() == [str(first.id)]


async def test_a_purged_letter_can_be_replayed_from_the_outbox(desk: Desk) -> None:
    """The page lists the order that waits for it, until the replay."""
    [order] = await desk.plant()
    answer = await change(desk.client, f"{PAGE}/purge", {"id": str(order.id), **ASKED}, PAGE)
    assert answer.status_code == 303
    page = await desk.page(answer.headers["location"])
    assert "The message was purged." in page
    assert "Purged, and their orders still wait" in page
    assert LETTER not in page
    assert "sends its event again, from the outbox" in await desk.page(f"{PAGE}?id={order.id}")
    answer = await change(desk.client, f"{PAGE}/replay", {"id": str(order.id), **ASKED}, PAGE)
    assert answer.headers["location"] == f"/console/orders/{order.id}"
    assert "Purged, and their orders still wait" not in await desk.page(PAGE)
    assert await desk.left() == []


@pytest.mark.parametrize(("action", "effect"), [("replay", REPLAYED), ("purge", "removed for good")])
async def test_a_dry_run_changes_nothing(desk: Desk, action: str, effect: str) -> None:
    """It says how many match, why they are dead, and what would happen."""
    orders = await desk.plant(3)
    page = await desk.page(f"{PAGE}/{action}")
    assert f"3 <small>of 3 would be {action}" in page
    assert effect in page
    assert f'<b>3</b> × <span class="why">{REASON}' in page
    assert await audit_rows(desk.pool) == []
    assert await desk.left() == [str(order.id) for order in orders]


@pytest.mark.parametrize("action", ["replay", "purge"])
async def test_all_are_handled_batch_by_batch(desk: Desk, action: str) -> None:
    """Each form handles the next ones, is recorded, and leads to the progress with the next form."""
    orders = await desk.plant(5)
    address, seen = f"{PAGE}/{action}", []
    form = {"limit": "2", **ASKED}
    while "<form" in (page := await desk.page(address)) and (fields := _fields(page)):
        answer = await change(desk.client, f"{PAGE}/{action}", {**fields, **form}, address)
        assert answer.status_code == 303
        address = answer.headers["location"]
        if found := re.search(r'figure">(\d) <small>of 5 \w+, (\d) left', await desk.page(address)):
            seen.append(found.groups())
    assert seen == [("2", "3"), ("4", "1"), ("5", "0")]
    assert "All that matched are done." in page
    assert len(await audit_rows(desk.pool)) == 3
    assert await desk.left() == []
    assert await _purged(desk.pool, len(orders)) == (action == "purge")


async def test_filters_select(broker_desk: Desk, channel: AbstractChannel) -> None:
    """By the age of the last failure and by id, on the page and in bulk."""
    old, recent = event(), event()
    await set_aside(channel, old, minutes_ago=20)
    await set_aside(channel, recent)
    await holds(channel, 2)
    for query, shown in (("since=15m", [recent]), (f"id={old.id}", [old]), (f"since=15m&id={old.id}", [])):
        page = await broker_desk.page(f"{PAGE}?{query}")
        assert [str(letter.id) for letter in (old, recent) if f'title="{letter.id}"' in page] == [
            str(letter.id) for letter in shown
        ]
    form = {**_fields(await broker_desk.page(f"{PAGE}/purge?since=15m")), **ASKED}
    assert (form["since"], form["left"]) == ("15m", "1")
    assert (await change(broker_desk.client, f"{PAGE}/purge", form, PAGE)).status_code == 303
    assert await broker_desk.left() == [str(old.id)]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("replay", {"id": "{}"}, 422),
        ("replay", {"id": "{}", "reason": " "}, 422),
        ("purge", {"limit": "2", "done": "0", "left": "1"}, 422),
        ("purge", {"limit": "1001", "done": "0", "left": "1", **ASKED}, 422),
        ("purge", {"limit": "x", "done": "0", "left": "1", **ASKED}, 422),
        ("purge", {"id": "{}", "since": "often", **ASKED}, 422),
        ("purge", {"id": "{}", "queue": "orders.other", **ASKED}, 422),
        ("replay", {"id": "nobody", **ASKED}, 404),
        ("peek", {"id": "{}", **ASKED}, 404),
    ],
)
async def test_a_refused_form_changes_nothing(local_desk: Desk, path: str, fields: dict[str, str], status: int) -> None:
    """It is answered with a page that says why."""
    [order] = await local_desk.plant()
    form = {name: value.format(order.id) for name, value in fields.items()}
    answer = await change(local_desk.client, f"{PAGE}/{path}", form, PAGE)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert await local_desk.left() == [str(order.id)]


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/replay"])
async def test_only_operators_see_dead_letters(database_url: str, path: str) -> None:
    """A reader gets a page that says so."""
    async with serving(database_url, **SETTINGS, **ISSUED) as client:
        await log_in(client, token(scope="orders:read"))
        answer = await client.get(path)
    assert (answer.status_code, "Only operators may do this" in answer.text) == (403, True)


async def test_text_of_a_publisher_is_only_text(broker_desk: Desk, channel: AbstractChannel) -> None:
    """Neither a reason nor an id nor a subject becomes markup or a link."""
    hostile = '"><script>alert(1)</script>'
    letter = event(subject="javascript:alert(1)")
    await set_aside(channel, letter, message_id=hostile)
    await holds(channel, 1)
    for path in (PAGE, f"{PAGE}?id={hostile}", f"{PAGE}/replay", f"{PAGE}/replay?done=1&left=1&reason={hostile}"):
        page = await broker_desk.page(path)
        assert "<script>" not in page
        assert 'href="javascript' not in page
        assert "/console/orders/javascript" not in page
    answer = await change(broker_desk.client, f"{PAGE}/replay", {"id": hostile, **ASKED}, PAGE)
    assert answer.headers["location"] == f"{PAGE}?done=replay"
    assert await broker_desk.left() == []


async def test_a_look_by_somebody_else_is_said(broker_desk: Desk, rabbitmq_url: str) -> None:
    """The page shows what it can; a form is refused, and says that nothing was changed."""
    [order] = await broker_desk.plant()
    async with scan(broker_desk.pool, rabbitmq_url):
        page, answer = await asyncio.gather(  # each waits for five seconds
            broker_desk.page(PAGE),
            change(broker_desk.client, f"{PAGE}/replay", {"id": str(order.id), **ASKED}, "/console"),
        )
    assert "cannot be shown right now: somebody else is going over the dead letters" in page
    assert '<div class="figure bad">1</div>' in page
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    assert "Nothing was changed" in answer.text
    assert await broker_desk.left() == [str(order.id)]


async def test_a_broker_lost_in_between_is_said(
    database_url: str, pool: Pool, broker_proxy: Proxy, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """The page says how many were surely replayed, and that a repeat is safe."""
    async with serving(database_url, rabbitmq_url=broker_proxy.url(rabbitmq_url), **SETTINGS) as client:
        await log_in(client)
        desk = Desk(client, pool, channel)
        [order] = await desk.plant()
        broker_proxy.arm(Lose(amqp.CONFIRM))
        answer = await change(client, f"{PAGE}/replay", {"id": str(order.id), **ASKED}, "/console")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "0 of at most 1 were surely replayed" in answer.text
        assert "no message takes effect twice" in answer.text
        broker_proxy.disarm()
        await holds(channel, 1)
        await holds(channel, 1, QUEUE)


async def test_without_a_broker_the_page_says_so(database_url: str) -> None:
    """What Postgres knows is still shown; a dry run is a 503."""
    async with serving(database_url, rabbitmq_url="amqp://127.0.0.1:1/", **SETTINGS) as client:
        await log_in(client)
        page = (await client.get(PAGE)).raise_for_status().text
        assert "The dead letters cannot be shown right now: the broker cannot be reached." in page
        assert 'id="recorded"' in page
        assert (await client.get(f"{PAGE}/replay")).status_code == 503


async def test_recorded_deaths_are_counted_without_purged_ones(pool: Pool) -> None:
    """Of the newest only: a page reads them every second."""
    orders = await park(pool, 3)
    for order in orders:
        await record_dead(pool, order)
    async with db.connection(pool) as conn:
        await inbox.mark_purged(conn, CONSUMER, [str(orders[0].id)])
        counts = [(await inbox.count_dead(conn, CONSUMER, at_most)).number for at_most in (1, 2, 3)]
    assert counts == [1, 2, 2]


async def _until(stream: httpx.Response, text: str) -> AsyncIterator[str]:
    async for line in stream.aiter_lines():
        if text in line:
            yield line
            return


def _fields(page: str) -> dict[str, str]:
    """Return the hidden fields of the form of a bulk action, without the token; none: there is no such form."""
    form = page[page.index('id="bulk-form"') :]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))
    fields.pop("form_token", None)
    return {**fields, "limit": "100"} if fields else {}


async def _purged(pool: Pool, number: int) -> bool:
    return bool(await pool.fetchval("SELECT count(*) = $1 FROM inbox WHERE purged_at IS NOT NULL", number))

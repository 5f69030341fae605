"""The console's outbox: what is not published, since when and why; parked events are requeued, one or all."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from app.db import Pool
from app.messaging import outbox
from tests.harness.api import serving
from tests.harness.console import SETTINGS, change, log_in
from tests.harness.console_letters import Desk, at_desk, park
from tests.harness.identity import SECRET, token
from tests.harness.operating import audit_rows
from tests.harness.orders import placed

PAGE = "/console/outbox"
REASON = "returned: no queue is bound for order.placed"
ASKED = {"reason": "the binding is back"}


@pytest.fixture
async def desk(database_url: str, pool: Pool) -> AsyncIterator[Desk]:
    """An operator's desk; no relay runs."""
    async with at_desk(database_url, pool) as desk:
        yield desk


async def test_what_waits_is_shown_with_its_reason(desk: Desk) -> None:
    """Parked, claimed and waiting events, with counts; the filter leaves the parked ones."""
    [parked] = await park(desk.pool, reason=REASON)
    claimed = await placed(desk.pool)
    async with desk.pool.acquire() as conn:
        await outbox.claim(conn, uuid4(), 1, lease_seconds=60)
    waiting = await placed(desk.pool)
    page = await desk.page(PAGE)
    places = [page.index(f">{order.id}</a>") for order in (parked, waiting, claimed)]
    assert places == sorted(places)
    assert [page.count(f'<span class="status {state}">') for state in ("parked", "claimed", "waiting")] == [1, 1, 1]
    assert REASON in page
    assert '<div class="figure">2</div>events wait' in page
    assert '<div class="figure bad">1</div>parked' in page
    only_parked = await desk.page(f"{PAGE}?parked=1")
    assert [f">{order.id}</a>" in only_parked for order in (parked, claimed, waiting)] == [True, False, False]


async def test_the_page_is_live(desk: Desk) -> None:
    """Its stream sends what has changed."""
    async with desk.client.stream("GET", f"{PAGE}?stream=1") as stream:
        lines = stream.aiter_lines()
        assert [line async for line in _until(lines, "Every event is published.")]
        order = await placed(desk.pool)
        assert [line async for line in _until(lines, str(order.id))]


async def test_a_requeued_event_leads_to_its_order(desk: Desk) -> None:
    """Only this one is requeued, the reason is recorded, and a second form is refused."""
    first, second = await park(desk.pool, 2)
    form = {"id": str(second.id), **ASKED}  # the event of a placed order has the order's id
    answer = await change(desk.client, f"{PAGE}/requeue", form, PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/console/orders/{second.id}")
    assert await desk.parked() == [str(first.id)]
    assert await audit_rows(desk.pool) == [("admin-token", "outbox requeue", second.id, ASKED["reason"], "pending")]
    assert (await change(desk.client, f"{PAGE}/requeue", form, PAGE)).status_code == 404


async def test_all_parked_events_are_requeued(desk: Desk) -> None:
    """One record says how many."""
    await park(desk.pool, 3)
    await placed(desk.pool)
    answer = await change(desk.client, f"{PAGE}/requeue", {"id": "all", **ASKED}, PAGE)
    assert answer.status_code == 303
    page = await desk.page(answer.headers["location"])
    assert "3 events are pending again" in page
    assert "No event is parked." in page
    assert '<div class="figure">4</div>events wait' in page
    assert await audit_rows(desk.pool) == [("admin-token", "outbox requeue", None, ASKED["reason"], "pending")]
    assert await desk.pool.fetchval("SELECT counts FROM operator_actions") == '{"requeued": 3}'


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"id": "all"}, 422),
        ({"id": "all", "reason": "\u202e"}, 422),
        ({"id": "seven", **ASKED}, 422),
        ({**ASKED}, 422),
        ({"id": str(uuid4()), **ASKED}, 404),
    ],
)
async def test_a_refused_form_changes_nothing(desk: Desk, fields: dict[str, str], status: int) -> None:
    """It is answered with a page that says why."""
    [order] = await park(desk.pool)
    answer = await change(desk.client, f"{PAGE}/requeue", fields, PAGE)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert await desk.parked() == [str(order.id)]
    assert await audit_rows(desk.pool) == []


async def test_text_of_a_broker_is_only_text(desk: Desk) -> None:
    """A reason is shown as it is, in the page and in its stream."""
    await park(desk.pool, reason="<script>alert(1)</script>")
    assert "&lt;script&gt;alert(1)" in await desk.page(PAGE)
    async with desk.client.stream("GET", f"{PAGE}?stream=1") as stream:
        [line] = [line async for line in _until(stream.aiter_lines(), "alert(1)")]
    assert "<script>" not in line


@pytest.mark.parametrize("query", ["parked=yes", "requeued=many", "requeued=99999999", "since=now"])
async def test_an_unknown_query_is_ignored(desk: Desk, query: str) -> None:
    """A link with a typing error leads to the whole outbox."""
    assert "Every event is published." in await desk.page(f"{PAGE}?{query}")


async def test_only_operators_see_the_outbox(database_url: str) -> None:
    """A reader gets a page that says so."""
    async with serving(database_url, **SETTINGS, auth_mode="jwt", auth_jwt_secret=SECRET) as client:
        await log_in(client, token(scope="orders:read"))
        answer = await client.get(PAGE)
    assert (answer.status_code, "Only operators may do this" in answer.text) == (403, True)


async def _until(lines: AsyncIterator[str], text: str) -> AsyncIterator[str]:
    async for line in lines:
        if text in line:
            yield line
            return

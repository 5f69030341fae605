"""The partners' page shows who is called, and pauses and resumes calls; one that rejects orders is asked for twice."""

import html
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from app.db import Pool
from tests.harness.api import serving
from tests.harness.console import SETTINGS, change, log_in, send
from tests.harness.operating import audit_rows, pause_partner
from tests.harness.orders import placed, start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

PAGE = "/console/partners"
WHY = "they charge <b>twice</b>"
PAUSE = {"partner": "payment", "for": "5m", "reason": WHY}
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


@pytest.fixture
async def console(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator who has logged in."""
    async with serving(database_url, **SETTINGS) as client:
        await log_in(client)
        yield client


async def panels(console: httpx.AsyncClient) -> list[str]:
    """Return the words of each partner's panel."""
    page = (await console.get(PAGE)).raise_for_status().text
    found = re.findall(r'<section class="panel" id="\w+".*?</section>', page, re.DOTALL)
    return [re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", " ", panel))).strip() for panel in found]


async def test_a_partner_is_paused_and_resumed(console: httpx.AsyncClient, pool: Pool) -> None:
    """The panel shows until when, by whom and why; the audit log has both actions."""
    await pool.execute("UPDATE sagas SET step = 'charge_payment' WHERE id = $1", await start_saga(pool))
    unknown = "not known: this process calls no partner"
    assert await panels(console) == [
        f"Inventory Sagas here 0 Circuit {unknown}",
        f"Payment Sagas here 1 Circuit {unknown}",
        f"Shipping Sagas here 0 Circuit {unknown}",
    ]
    answer = await change(console, f"{PAGE}/pause", PAUSE, PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, f"{PAGE}#payment")
    paused = (await panels(console))[1]
    assert re.fullmatch(rf"Payment paused Until .* By admin-token Reason {WHY} Sagas here 1 Circuit .*", paused)
    assert "<b>" not in (await console.get(PAGE)).text
    answer = await change(console, f"{PAGE}/resume", {"partner": "payment", "reason": "it is back"}, PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, f"{PAGE}#payment")
    assert (await panels(console))[1].startswith("Payment Sagas")
    assert await audit_rows(pool) == [
        ("admin-token", "partner pause", None, WHY, "paused"),
        ("admin-token", "partner resume", None, "it is back", "resumed"),
    ]


async def test_a_pause_that_rejects_orders_is_confirmed_first(console: httpx.AsyncClient, pool: Pool) -> None:
    """With their number and until when new ones are rejected, too. Until then nothing has been done."""
    await start_saga(pool)
    await placed(pool)
    asked = await change(console, f"{PAGE}/pause", {**PAUSE, "for": "30m"}, PAGE)
    assert asked.status_code == httpx.codes.OK
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", asked.text))
    assert "Pause payment for 30 min?" in text
    assert "2 unfinished orders reach their deadline before the pause ends, and would be rejected." in text
    assert re.search(r"Orders that are placed before \d\d:\d\d:\d\d would be rejected, too\.", text)
    assert await audit_rows(pool) == []
    form = {name: html.unescape(value) for name, value in HIDDEN.findall(asked.text)}
    answer = await send(console, f"{PAGE}/pause", form)
    assert answer.status_code == httpx.codes.SEE_OTHER
    assert (await panels(console))[1].startswith("Payment paused")
    assert [row[3:] for row in await audit_rows(pool)] == [(WHY, "paused")]


async def test_a_pause_that_cannot_be_previewed_is_confirmed_first(database_url: str, pool: Pool) -> None:
    """How many orders it rejects is not known in time. Confirmed, it begins all the same."""
    async with serving(database_url, **SETTINGS, database_statement_seconds=1) as console:
        await log_in(console)
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute("LOCK TABLE sagas")
            asked = await change(console, f"{PAGE}/pause", PAUSE, "/console/audit")
            assert asked.status_code == httpx.codes.OK
            assert "could not be counted" in asked.text
            assert await audit_rows(pool) == []
            form = {name: html.unescape(value) for name, value in HIDDEN.findall(asked.text)}
            answer = await send(console, f"{PAGE}/pause", form)
        assert answer.status_code == httpx.codes.SEE_OTHER
        assert [row[3:] for row in await audit_rows(pool)] == [(WHY, "paused")]


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("pause", {**PAUSE, "partner": "acme"}, 404, "There is no such partner"),
        ("pause", {**PAUSE, "for": "soon"}, 422, "The time of the pause must be like"),
        ("pause", {**PAUSE, "for": "100d"}, 422, "The time of the pause must be like"),
        ("pause", {**PAUSE, "reason": " "}, 422, "The reason must be one line"),
        ("pause", {**PAUSE, "reason": "a\nb"}, 422, "The reason must be one line"),
        ("pause", {}, 404, "There is no such partner"),
        ("resume", {"partner": "payment"}, 422, "The reason must be one line"),
        ("resume", {"partner": "", "reason": WHY}, 404, "There is no such partner"),
    ],
    ids=str,
)
async def test_a_mistake_changes_nothing(
    console: httpx.AsyncClient, pool: Pool, path: str, fields: dict[str, str], status: int, words: str
) -> None:
    """A page says what is wrong."""
    answer = await change(console, f"{PAGE}/{path}", fields, PAGE)
    assert answer.status_code == status
    assert words in answer.text
    assert await audit_rows(pool) == []


async def test_a_whole_process_obeys_at_once(database_url: str, sandbox_url: str) -> None:
    """A pause by the page wakes the process that serves it, which then shows its own circuits, too."""
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with serving(database_url, roles="api,relay,consumer", **SETTINGS, **urls) as console:
        await log_in(console)
        assert (await panels(console))[1] == "Payment ok Sagas here 0 Circuit closed"
        assert (await change(console, f"{PAGE}/pause", PAUSE, PAGE)).status_code == httpx.codes.SEE_OTHER

        async def is_obeyed() -> bool:
            return 'partner_paused{partner="payment"} 1.0' in (await console.get("/metrics")).text

        await wait_until(is_obeyed, AMPLE_SECONDS, "the pause in the metrics")


async def test_a_stream_follows_what_others_do(console: httpx.AsyncClient, pool: Pool) -> None:
    """A pause by a command appears without a reload."""
    async with console.stream("GET", f"{PAGE}?stream=1", timeout=AMPLE_SECONDS) as stream:
        lines = stream.aiter_lines()
        assert "paused" not in await anext(line async for line in lines if line.startswith('data: {"id": "partners"'))
        await pause_partner(pool, "shipping")
        assert "the warehouse burns" in await anext(line async for line in lines if line.startswith('data: {"id"'))

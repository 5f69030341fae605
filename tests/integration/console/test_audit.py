"""The audit page shows what operators did, newest first; the address selects and pages."""

import html
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.db import Pool
from app.operations import audit
from app.operations.audit import AuditActor
from tests.harness.api import serving
from tests.harness.console import SETTINGS, log_in
from tests.harness.operating import OPERATOR, pause_partner, retry
from tests.harness.orders import placed, start_saga

PAGE = "/console/audit"
ROW = re.compile(r"<tr>\s*<td>.*?</tr>", re.DOTALL)
CELL = re.compile(r"<td[^>]*>(.*?)</td>", re.DOTALL)
HOSTILE = "</td><script>alert('reason')</script>"


@pytest.fixture
async def console(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator who has logged in."""
    async with serving(database_url, **SETTINGS) as client:
        await log_in(client)
        yield client


async def read(console: httpx.AsyncClient, address: str = PAGE, **query: Any) -> list[list[str]]:
    """Return the cells of each row, without the time."""
    page = (await console.get(address, params=query or None)).raise_for_status().text
    return [
        [re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", "", cell))).strip() for cell in CELL.findall(row)[1:]]
        for row in ROW.findall(page)
    ]


async def record(pool: Pool, actor: str, action: str, order_id: UUID | None = None, outcome: str = "done") -> None:
    async with pool.acquire() as conn:
        await audit.record(conn, AuditActor(actor, "because"), action, order_id, outcome)


async def test_actions_are_shown_newest_first(console: httpx.AsyncClient, pool: Pool) -> None:
    """Who, what, about what, why, and with what outcome. Targets are links."""
    assert await read(console) == []
    order_id = await start_saga(pool)
    await retry(pool, order_id)
    await pause_partner(pool, "payment", 1800)
    async with audit.on_record(pool, AuditActor("grace"), "dlq replay", None, {"limit": 100}) as command:
        command.counts |= {"looked_at": 3, "matched": 2}
    why = OPERATOR.reason
    assert await read(console) == [
        ["grace", "dlq replay", "messages", "none given", "done matched 2 · looked at 3"],
        ["cli:ada", "partner pause", "payment for 30 min", why, "paused"],
        ["cli:ada", "retry", str(order_id), why, "due-already"],
    ]
    page = (await console.get(PAGE)).text
    assert f'href="/console/orders/{order_id}"' in page
    assert 'href="/console/partners#payment"' in page


async def test_filters_are_in_the_address(console: httpx.AsyncClient, pool: Pool) -> None:
    """Each selects; a field that was left empty does not; the form keeps what was chosen."""
    order_id = (await placed(pool)).id
    await record(pool, "ada", "retry", order_id)
    await record(pool, "grace", "compensate", order_id)
    await record(pool, "ada", "outbox requeue")
    await pool.execute("UPDATE operator_actions SET at = at - interval '2 h' WHERE action = 'compensate'")

    async def actions(**query: str) -> list[str]:
        return [row[1] for row in await read(console, **query)]

    assert await actions(order=str(order_id)) == ["compensate", "retry"]
    assert await actions(actor="ada") == ["outbox requeue", "retry"]
    assert await actions(action="compensate") == ["compensate"]
    assert await actions(since="1h") == ["outbox requeue", "retry"]
    assert await actions(since="3h", actor="grace") == ["compensate"]
    assert await actions(actor="nobody") == []
    assert await actions(order=" ", actor="", action="", since="") == ["outbox requeue", "compensate", "retry"]
    page = (await console.get(PAGE, params={"actor": '"ada', "since": "3h", "action": "retry"})).text
    assert 'value="&#34;ada"' in page
    assert "<option selected>retry</option>" in page
    assert '<option value="3h" selected>the last 3h</option>' in page


async def test_pages_have_neither_gaps_nor_repeats(console: httpx.AsyncClient, pool: Pool) -> None:
    """Also if somebody acts meanwhile. The links keep the filters."""
    for number in range(120):
        await record(pool, "ada", "retry", outcome=f"outcome {number}")
    await record(pool, "grace", "retry", outcome="another's")
    address, found = f"{PAGE}?actor=ada&order=", []
    while address:
        page = (await console.get(address)).raise_for_status().text
        found += [row[-1] for row in await read(console, address)]
        await record(pool, "ada", "retry", outcome="later")
        link = re.search(r'href="([^"]*)" rel="next"', page)
        address = html.unescape(link[1]) if link else ""
        assert not address or "actor=ada" in address
    assert found == [f"outcome {number}" for number in reversed(range(120))]
    assert 'href="/console/audit?actor=ada">Newest</a>' in page


@pytest.mark.parametrize(
    "query",
    [
        "order=x",
        "actor=%00",
        "action=%00",
        "order=1' OR 1=1",
        "since=soon",
        "since=-1h",
        "cursor=x",
        "cursor=-1",
        "cursor=" + "9" * 30,
    ],
)
async def test_a_malformed_filter_is_refused(console: httpx.AsyncClient, query: str) -> None:
    """With a page that says which one."""
    answer = await console.get(f"{PAGE}?{query}")
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert f"/query/{query.partition('=')[0]}" in answer.text


async def test_hostile_text_is_only_shown(console: httpx.AsyncClient, pool: Pool) -> None:
    """No recorded text becomes markup, wherever it is shown."""
    await record(pool, HOSTILE, HOSTILE, outcome=HOSTILE)
    counts = "jsonb_build_object($1::text, $1::text)"
    await pool.execute(f"UPDATE operator_actions SET reason = $1::text, counts = {counts}", HOSTILE)  # noqa: S608 - a constant
    page = (await console.get(PAGE)).text
    assert "<script>alert" not in page
    assert page.count("alert(&#39;reason&#39;)") >= 5

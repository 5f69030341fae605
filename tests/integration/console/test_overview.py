"""The overview says what is wrong first, with a link to it, and then what happened in the last minutes."""

import html
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from app.db import Pool
from chaos.proxy.faults import Refuse
from tests.harness import identity
from tests.harness.api import serving
from tests.harness.console import SETTINGS, log_in
from tests.harness.operating import pause_partner
from tests.harness.orders import placed, start_saga
from tests.harness.proxied import Proxied
from tests.harness.queues import CONSUMER
from tests.harness.wait import AMPLE_SECONDS, wait_until

NOTICE = re.compile(r'<p class="notice (\w+)"[^>]*>(.*?)</p>', re.DOTALL)
FIGURE = re.compile(
    r'<h3>(.*?)</h3>\s*<div class="figure">(.*?)</div>.*?<small class="muted">(.*?)</small></div>', re.DOTALL
)
LINK = re.compile(r'href="([^"]*)"')
A_BROKER = "amqp://orders:orders@127.0.0.1:1/"  # nothing listens there; the role `api` connects to no broker
KILLED = "UPDATE operator_actions SET outcome = 'unfinished', at = at - interval '2 h'"


@pytest.fixture
async def console(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator who has logged in. Dead letters are those of a broker."""
    async with serving(database_url, rabbitmq_url=A_BROKER, **SETTINGS) as client:
        await log_in(client)
        yield client


def words(content: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", "", content))).strip()


async def notices(console: httpx.AsyncClient) -> list[tuple[str, str, str]]:
    """Return what the page reports: level, headline, and link."""
    page = (await console.get("/console")).raise_for_status().text
    found = []
    for level, content in NOTICE.findall(page):
        headline = re.search("<strong>(.*?)</strong>", content, re.DOTALL)
        link = LINK.search(content)
        assert headline is not None
        found.append((level, words(headline[1]), html.unescape(link[1]) if link else ""))
    return found


async def figures(console: httpx.AsyncClient) -> dict[str, tuple[str, str]]:
    page = (await console.get("/console")).raise_for_status().text
    return {name: (words(figure), words(note)) for name, figure, note in FIGURE.findall(page)}


async def test_nothing_wrong_is_one_line(console: httpx.AsyncClient) -> None:
    """Without history, figures and their pictures are there."""
    assert await notices(console) == [("good", "Nothing needs you.", "")]
    assert await figures(console) == {
        "Placed": ("0 per second", "0 in all"),
        "Finished": ("0 per second", "0 in all"),
        "Unfinished": ("0 orders", "0 events wait in the outbox"),
        "Answer to an order": ("–", "until the 201, in the last minute, of this process"),
        "Saga": ("–", "from start to end, in the last minute"),
    }


async def test_everything_wrong_is_listed(console: httpx.AsyncClient, pool: Pool) -> None:
    """The most pressing first, each counted, with a link to where it is."""
    late, failing, old = [await start_saga(pool) for _ in range(3)]
    await pool.execute("UPDATE sagas SET deadline_at = clock_timestamp() - interval '2 min' WHERE id = $1", late)
    await pool.execute("UPDATE sagas SET needs_operator_at = clock_timestamp() WHERE id = $1", failing)
    await pool.execute("UPDATE sagas SET started_at = clock_timestamp() - interval '6 min' WHERE id = $1", old)
    dead, parked, waiting = [(await placed(pool)).id for _ in range(3)]
    await pool.execute(
        "INSERT INTO inbox (consumer, message_id, attempts, dead_at) VALUES ($1, $2, 7, clock_timestamp())",
        CONSUMER,
        str(dead),
    )
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp() WHERE id = $1", parked)
    await pool.execute("UPDATE outbox SET pending_since = occurred_at - interval '2 min' WHERE id = $1", waiting)
    await pause_partner(pool, "payment")
    await pool.execute(KILLED)
    assert await notices(console) == [
        ("bad", "1 order needs an operator", "/console/orders?needs_operator=1"),
        ("bad", "2 orders are stuck", "/console/orders?stuck=1"),
        ("bad", "1 order cannot start", "/console/orders?stuck=1"),
        ("bad", "1 dead letter", "/console/dead-letters"),
        ("bad", "1 event is parked", "/console/outbox?parked=1"),
        ("bad", "Events wait for the broker: 5 events", "/console/outbox"),
        ("warn", "The oldest unfinished saga is more than 5 minutes old", f"/console/orders/{old}"),
        ("warn", "1 row of operator_actions is past the age limit", "/console/audit"),
        ("warn", "Calls to payment are paused by cli:ada", "/console/partners#payment"),
    ]
    assert (await figures(console))["Unfinished"][0] == "6 orders"


async def test_without_a_broker_parked_is_dead(database_url: str, pool: Pool) -> None:
    """The in-process transport's dead letters are parked rows: they are listed once."""
    await placed(pool)
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp()")
    async with serving(database_url, **SETTINGS) as console:
        await log_in(console)
        assert await notices(console) == [("bad", "1 dead letter", "/console/dead-letters")]


async def test_hostile_text_is_only_shown(console: httpx.AsyncClient, pool: Pool) -> None:
    """A reason cannot become markup."""
    await pause_partner(pool, "payment")
    await pool.execute("UPDATE partner_pauses SET reason = '<script>alert(1)</script>', actor = '<b>ada</b>'")
    page = (await console.get("/console")).text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>ada" not in page


async def test_a_lost_database_is_the_only_concern(proxied: Proxied) -> None:
    """The page is still shown, and says so: it is where an operator looks first."""
    async with serving(proxied.url, **SETTINGS) as console:
        await log_in(console)
        assert [level for level, _, _ in await notices(console)] == ["good"]
        proxied.proxy.arm(Refuse())
        proxied.proxy.cut()

        async def is_reported() -> bool:
            return ("bad", "Postgres does not answer.", "") in await notices(console)

        await wait_until(is_reported, AMPLE_SECONDS, "the notice")
        assert [text for level, text, _ in await notices(console) if level == "bad"] == ["Postgres does not answer."]
        assert await figures(console) == {}


async def test_only_operators_see_it(database_url: str) -> None:
    """A reader of one tenant is refused, with a way to what it may see."""
    jwt = {"auth_mode": "jwt", "auth_jwt_secret": identity.SECRET}
    async with serving(database_url, **SETTINGS, **jwt) as console:
        await log_in(console, identity.token(scope="orders:read"))
        answer = await console.get("/console")
        assert answer.status_code == httpx.codes.FORBIDDEN
        assert 'href="/console/orders"' in answer.text

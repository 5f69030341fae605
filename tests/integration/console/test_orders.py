"""The list of orders and its search: every order once, found by each kind of id, and by its own tenant only."""

import html
import re
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from markupsafe import escape

from app import db
from app.idempotency.key import bind
from app.operations.order_list import MAX_TENANTS
from app.operations.order_search import MAX_HITS
from app.orders import store
from app.orders.model import Order
from app.saga import start
from tests.harness.api import serving
from tests.harness.console import SETTINGS, log_in
from tests.harness.identity import SECRET, token
from tests.harness.orders import DEADLINE_SECONDS, event_of, place, placed, start_saga
from tests.harness.sagas import Stage

PAGE = 50
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
KEY, CUSTOMER = "the-key/of:acme", "the customer of acme"
JWT = {**SETTINGS, "auth_mode": "jwt", "auth_jwt_secret": SECRET}
LISTED = re.compile(r'id="order-([0-9a-f-]{36})"')
LINK = {rel: re.compile(rf'href="([^"]*)" rel="{rel}"') for rel in ("next", "prev")}
CONSUMER = "saga"


@pytest.fixture
async def operator(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The client of an operator, who sees all tenants."""
    async with serving(database_url, **SETTINGS) as client:
        await log_in(client)
        yield client


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The client of somebody who may read the orders of the tenant `acme`."""
    async with serving(database_url, **JWT) as client:
        await log_in(client, token(scope="orders:read", tenant="acme"))
        yield client


async def show(client: httpx.AsyncClient, query: str = "") -> str:
    """Return the page of orders."""
    return (await client.get(f"/console/orders{query and '?'}{query}")).raise_for_status().text


async def listed(client: httpx.AsyncClient, query: str = "") -> list[str]:
    """Return the ids of the orders on one page, in order."""
    return LISTED.findall(await show(client, query))


async def found(client: httpx.AsyncClient, text: str, more: str = "") -> str:
    """Search; return the address that the answer leads to, or its page."""
    answer = await client.get(f"/console/orders?q={quote(text, safe='')}{more}", follow_redirects=False)
    return answer.headers["location"] if answer.is_redirect else answer.raise_for_status().text


async def pages(client: httpx.AsyncClient, address: str, direction: str) -> tuple[list[list[str]], str]:
    """Follow the links in this direction; return the ids on each page, and the address of the last one."""
    seen = []
    while True:
        text = (await client.get(address)).raise_for_status().text
        seen.append(LISTED.findall(text))
        link = LINK[direction].search(text)
        if link is None:
            return seen, address
        address = html.unescape(link[1])


def without(page: str, *texts: str) -> str:
    """Return a page without these texts and the address of its stream."""
    for text in texts:
        page = page.replace(str(escape(text)), "")
    return re.sub(r'data-stream="[^"]*"', "", page)


async def finish_one(stage: Stage, tenant: str = "acme") -> tuple[Order, dict[str, str]]:
    """Place an order with all kinds of ids, and confirm it; return it and the ids."""
    key = bind(tenant, KEY, "POST", "/orders", "", {})
    answer = await place(stage.pool, key, tenant=tenant, customer_id=CUSTOMER, trace=TRACE)
    [order] = (await load(stage.pool, UUID(answer.location.rpartition("/")[2]))).values()
    async with stage.pool.acquire() as conn, conn.transaction():
        await start.handle_order_placed(conn, [event_of(order, **TRACE)], DEADLINE_SECONDS)
    await stage.drive()
    tracking_id = await stage.pool.fetchval("SELECT tracking_id FROM orders WHERE id = $1", order.id)
    payment_id = await stage.pool.fetchval(
        "SELECT reply ->> 'payment_id' FROM saga_steps WHERE saga_id = $1 AND reply ? 'payment_id'", order.id
    )
    ids = {
        "order": str(order.id),
        "order, as Postgres also reads it": order.id.hex.upper(),
        "customer": CUSTOMER,
        "key": KEY,
        "key, as in its header": f'"{KEY}"',
        "tracking": tracking_id,
        "payment": payment_id,
        "trace": TRACE_ID.upper(),
        "traceparent": TRACE["traceparent"],
    }
    return order, ids


async def load(pool: db.Pool, order_id: UUID) -> Mapping[UUID, Order]:
    async with pool.acquire() as conn:
        return await store.load_many(conn, [order_id])


async def place_many(pool: db.Pool, number: int, tenants: int = 2) -> None:
    """Insert orders of `tenants` tenants, one in four pending, ten customers; many have the same instant."""
    await pool.execute(
        """
        WITH placed AS (
            INSERT INTO orders (id, tenant, status, customer_id, currency, total_minor, version, placed_at, updated_at)
            SELECT gen_random_uuid(), 'tenant_' || n % $2, CASE n % 4 WHEN 0 THEN 'pending' ELSE 'confirmed' END,
                   'cus_' || n % 10, 'USD', 999, 2, now() - make_interval(secs => n / 7), now()
            FROM generate_series(1, $1) AS n
            RETURNING id
        )
        INSERT INTO order_lines (order_id, number, sku, quantity, unit_price_minor)
        SELECT id, line, 'WIDGET', 1, 999 FROM placed, generate_series(1, 3) AS line
        """,
        number,
        tenants,
    )


async def kill_letter(pool: db.Pool, order: Order) -> None:
    """Record that the event of the order is a dead letter."""
    await pool.execute(
        "INSERT INTO inbox (consumer, message_id, attempts, last_error, dead_at)"
        " VALUES ($1, $2, 7, 'ValueError: no such thing', clock_timestamp())",
        CONSUMER,
        str(order.id),
    )


async def test_a_search_by_any_id_leads_to_the_order(operator: httpx.AsyncClient, stage: Stage) -> None:
    """Order, customer, live idempotency key, tracking, payment and trace id, in each form that people paste."""
    order, ids = await finish_one(stage)
    for name, text in ids.items():
        assert await found(operator, f" {text} ") == f"/console/orders/{order.id}", name
        assert await found(operator, text, "&tenant=acme") == f"/console/orders/{order.id}", name
        assert "Nothing found in the orders of the tenant other." in await found(operator, text, "&tenant=other"), name


async def test_an_expired_key_is_not_found(operator: httpx.AsyncClient, stage: Stage) -> None:
    """A key counts while it lives."""
    await finish_one(stage)
    await stage.pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    assert "Nothing found" in await found(operator, KEY)


async def test_several_hits_are_a_list(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """Each says as what it was found; the newest comes first."""
    one = await placed(pool, customer_id="abc")
    key = bind("other", "abc", "POST", "/orders", "", {})
    answer = await place(pool, key, tenant="other", customer_id="abc")
    page = await found(operator, "abc")
    assert LISTED.findall(page) == [answer.location.rpartition("/")[2], str(one.id)]
    assert "<td>customer, idempotency key</td>" in page
    assert "<td>customer</td>" in page
    assert 'href="/console/orders?customer_id=abc"' in page


async def test_no_hit_says_what_was_looked_for_and_where(operator: httpx.AsyncClient) -> None:
    """Only what the text can be is named; it is shown as text."""
    page = await found(operator, "<b>two words</b>")
    assert "Nothing found in the orders of all tenants. Looked for:" in page
    assert "&lt;b&gt;two words&lt;/b&gt;" in page
    assert "<b>" not in page
    assert re.findall(r"<li>([a-z ]+)", page.partition('id="rows"')[2]) == ["customer", "tracking id", "payment id"]
    assert "<li>trace id" in await found(operator, TRACE_ID)


async def test_a_reader_finds_and_lists_only_its_tenants_orders(reader: httpx.AsyncClient, stage: Stage) -> None:
    """A search for another tenant's order, by any id, answers as if there were none."""
    order, ids = await finish_one(stage, "other")
    own = await placed(stage.pool, tenant="acme")
    for name, text in ids.items():
        nothing = text.replace(text[0], "8" if text[0] != "8" else "9", 1)
        pages_shown = [await found(reader, searched) for searched in (text, nothing)]
        assert "Nothing found in the orders of the tenant acme." in pages_shown[0], name
        assert len({without(page, text, nothing) for page in pages_shown}) == 1, name
    assert await listed(reader) == [str(own.id)]
    assert await listed(reader, "status=confirmed") == []
    assert await listed(reader, f"customer_id={quote(CUSTOMER)}") == []
    assert str(order.id) not in await show(reader)


@pytest.mark.parametrize("query", ["tenant=other", "tenant=acme", "stuck=1", "needs_operator=1"])
async def test_a_reader_may_not_use_the_filters_of_operators(reader: httpx.AsyncClient, query: str) -> None:
    """It is refused, not ignored; and the page does not offer them."""
    answer = await reader.get(f"/console/orders?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (403, "text/html; charset=utf-8")
    page = await show(reader)
    assert "Needs an operator" not in page
    assert 'name="tenant"' not in page


FILTERS = {
    "": "true",
    "status=confirmed": "status = 'confirmed'",
    "status=pending": "status = 'pending'",
    "customer_id=cus_3": "customer_id = 'cus_3'",
    "tenant=tenant_1": "tenant = 'tenant_1'",
    "tenant=tenant_1&status=pending": "false",  # the pending ones have even numbers
    "tenant=tenant_0&status=pending&customer_id=": "status = 'pending' AND tenant = 'tenant_0'",
}


async def test_every_order_is_on_one_page_in_both_directions(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """Older and newer lead over the same pages, whatever the filter, also where many have the same instant."""
    await place_many(pool, 530)
    for query, condition in FILTERS.items():
        expected = {str(row["id"]) for row in await pool.fetch(f"SELECT id FROM orders WHERE {condition}")}  # noqa: S608 - constants
        older, last = await pages(operator, f"/console/orders?{query}", "next")
        seen = [order_id for page in older for order_id in page]
        assert (len(seen), set(seen)) == (len(expected), expected), query
        assert {len(page) for page in older[:-1]} <= {PAGE}, query
        newer, _ = await pages(operator, last, "prev")
        back = [order_id for page in reversed(newer) for order_id in page]
        assert list(dict.fromkeys(back)) == seen, query
        assert newer[-1] == older[0], query


async def test_bounds_of_time_are_exclusive_and_in_utc(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """A form sends a date and time without an offset; an address may have one."""
    orders = [await placed(pool) for _ in range(3)]
    instant = orders[1].placed_at
    for tenant in ("", "&tenant=default"):
        for written in (instant.isoformat().replace("+00:00", "Z"), instant.strftime("%Y-%m-%dT%H:%M:%S.%f")):
            assert await listed(operator, f"placed_after={written}{tenant}") == [str(orders[2].id)]
            assert await listed(operator, f"placed_before={written}{tenant}") == [str(orders[0].id)]
    minute = f"{instant - timedelta(minutes=1):%Y-%m-%dT%H:%M}"
    assert len(await listed(operator, f"placed_after={minute}")) == 3
    assert f'value="{minute}:00"' in await show(operator, f"placed_after={minute}")


async def test_orders_that_need_attention_are_listed(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """Stuck are overdue sagas, those that need an operator, and orders whose event is a dead letter."""
    fine, overdue, failing = [await start_saga(pool, tenant=tenant) for tenant in ("a", "b", "c")]
    dead = await placed(pool, tenant="d")
    await kill_letter(pool, dead)
    await pool.execute("UPDATE sagas SET next_attempt_at = now() - interval '2 min' WHERE id = $1", overdue)
    await pool.execute("UPDATE sagas SET needs_operator_at = clock_timestamp() WHERE id = $1", failing)
    assert await listed(operator, "stuck=1") == [str(dead.id), str(failing), str(overdue)]
    assert await listed(operator, "stuck=1&tenant=b") == [str(overdue)]
    assert await listed(operator, "needs_operator=1") == [str(failing)]
    assert await listed(operator) == [str(dead.id), str(failing), str(overdue), str(fine)]
    row = (await show(operator, "stuck=1&tenant=d")).partition(f"order-{dead.id}")[2]
    assert ">stuck</span>" in row
    assert ">dead-letter</span> order.placed" in row
    assert "ValueError: no such thing, attempt 7" in row
    await pool.execute("UPDATE sagas SET finished_at = clock_timestamp()")
    assert await listed(operator, "needs_operator=1") == []


async def test_a_row_shows_its_last_failure(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """The newest call that failed, also after one that succeeded, with lines, total and reason."""
    saga = await start_saga(pool, customer_id="<cus>")
    await pool.execute(
        """
        INSERT INTO saga_steps (saga_id, step, action, attempt, outcome, detail)
        VALUES ($1, 'reserve_inventory', 'do', 1, 'unknown', 'HTTP 500'),
               ($1, 'charge_payment', 'undo', 4, 'not-sent', '<connect>'),
               ($1, 'charge_payment', 'undo', 5, 'done', NULL), ($1, 'reserve_inventory', 'undo', 1, 'attempted', NULL)
        """,
        saga,
    )
    await pool.execute("UPDATE orders SET status = 'compensating', status_reason = 'card-declined'")
    page = await show(operator)
    assert ">not-sent</span> undo of charge_payment" in page
    assert "&lt;connect&gt;, attempt 4" in page
    assert "card-declined" in page
    assert "29.97 USD" in page
    assert "HTTP 500" not in page
    assert "<cus>" not in page


async def test_a_list_says_if_it_left_tenants_out(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """Rare orders are looked up for each tenant, and only for so many."""
    await place_many(pool, 4 * MAX_TENANTS, MAX_TENANTS)
    assert "choose a tenant" not in await show(operator, "customer_id=cus_1")
    await placed(pool, tenant="zzz")
    assert "choose a tenant" in await show(operator, "customer_id=cus_1")
    assert "choose a tenant" not in await show(operator)


@pytest.mark.parametrize(
    "query",
    [
        "q=%00",
        "q=two%0Alines",
        "q=%E2%80%AEreversed",
        "q=" + "x" * 256,
        "q=x&status=pending",
        "q=x&older=" + "A" * 32,
        "q=x&q=y",
        "status=shipped",
        "customer_id=%00",
        "customer_id=4111111111111111",
        "tenant=" + "x" * 201,
        "placed_after=yesterday",
        "placed_before=0001-01-01T00:00:00%2B01:00",
        "stuck=yes",
        "stuck=1&needs_operator=1",
        "older=rubbish",
        "older=AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA&newer=AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "offset=5",
        "=",
    ],
)
async def test_a_hostile_query_is_refused(operator: httpx.AsyncClient, query: str) -> None:
    """An unknown, repeated, malformed or contradictory parameter is a page that says so."""
    answer = await operator.get(f"/console/orders?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "text/html; charset=utf-8")


@pytest.mark.parametrize("text", ["%", "_", "'; DROP TABLE orders; --", "\\", "🐘", "{{7*7}}", "ffff", "x" * 255])
async def test_any_text_may_be_searched_for(operator: httpx.AsyncClient, text: str) -> None:
    """Text that looks like SQL, a pattern or a template is text."""
    page = await found(operator, text)
    assert "Nothing found" in page
    assert escape(text) in page


async def test_a_search_says_that_it_is_cut(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """It shows as many orders as it may, the newest, and says when there are more."""
    for number in range(MAX_HITS + 1):
        await placed(pool, customer_id="cus_many")
        if number == MAX_HITS - 1:
            assert "these are not all" not in await found(operator, "cus_many")
    assert "these are not all" in await found(operator, "cus_many")


async def test_a_stream_shows_a_search_again(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """The stream of a search sends its rows, without searching again for each viewer."""
    orders = [await placed(pool, customer_id="abc") for _ in range(2)]
    async with operator.stream("GET", "/console/orders?q=abc&stream=1") as answer:
        async for line in answer.aiter_lines():
            if '"id": "rows"' in line:
                assert all(str(order.id) in line for order in orders)
                return


async def test_an_unknown_position_is_an_empty_page(operator: httpx.AsyncClient, pool: db.Pool) -> None:
    """A cursor only marks a position: before the first order there is nothing older, and the newer ones are listed."""
    order = await placed(pool)
    cursor = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    assert await listed(operator, f"older={cursor}") == []
    assert await listed(operator, f"newer={cursor}") == [str(order.id)]

"""Sessions and rights in the console: every process knows them, they end, and no form of others is accepted."""

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from app.console.sessions import COOKIE
from app.main import create_app
from app.settings import Settings, load
from tests.harness.api import assert_problem, serving
from tests.harness.console import ADMIN_TOKEN, SETTINGS, log_in, send
from tests.harness.identity import SECRET, token
from tests.harness.wait import AMPLE_SECONDS, wait_until

JWT = {"auth_mode": "jwt", "auth_jwt_secret": SECRET}
OPEN = {"/console/", "/console/login", "/console/files/{version}/{name}"}  # to everybody
FOR_READERS = {"/console/orders", "/console/orders/{order_id}", "/console/orders/{order_id}/raw", "/console/logout"}
SECRET_SKU, SECRET_CUSTOMER = "SECRET-SKU", "cus_secret"
SOME_ID = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def console(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url, **JWT, **SETTINGS) as client:
        yield client


@pytest.fixture
def routes(database_url: str) -> list[APIRoute]:
    """Every route of the console that is not open to everybody."""
    app = create_app(load(Settings, database_url=database_url, roles="api", **SETTINGS))
    found = [route for route in flatten(app.routes) if route.path.startswith("/console") and route.path not in OPEN]
    assert len(found) > 1
    return found


def flatten(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """Return every route. FastAPI keeps an included router as one entry that contains its routes."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        yield from flatten(getattr(getattr(route, "original_router", None), "routes", ()))


def addresses(routes: Iterable[APIRoute], method: str) -> list[str]:
    """Return an address of each route with this method."""
    return [
        route.path.format_map(dict.fromkeys(route.param_convertors, SOME_ID))
        for route in routes
        if method in (route.methods or ())
    ]


async def test_every_process_knows_a_session(database_url: str) -> None:
    """A session of one process is accepted by another with the same admin token, and by none with another."""
    async with (
        serving(database_url, **SETTINGS) as one,
        serving(database_url, **SETTINGS) as two,
        serving(database_url, console="true", admin_token="another-token-of-operators") as third,
    ):
        await log_in(one)
        session = {"Cookie": f"{COOKIE}={one.cookies[COOKIE]}"}
        assert (await two.get("/console", headers=session)).status_code == 200
        assert (await third.get("/console", headers=session)).status_code == 303


async def test_a_session_ends_with_its_token(console: httpx.AsyncClient) -> None:
    """Then a page leads to the login and back, a form is refused, and a stream says that the session is over."""
    given = token(scope="orders:operate", exp=time.time() + 2)
    cookie = {"Cookie": f"{COOKIE}=issued.{given}"}

    async def is_over() -> bool:
        return (await console.get("/console?a=1", headers=cookie)).status_code == httpx.codes.SEE_OTHER

    await wait_until(is_over, AMPLE_SECONDS, "end of the session")
    page = await console.get("/console?a=1", headers=cookie)
    assert page.headers["location"] == "/console/login?next=%2Fconsole%3Fa%3D1"
    stream = await console.get("/console?stream=1", headers=cookie)
    assert (stream.status_code, stream.text) == (200, "event: expired\ndata: \n\n")
    origin = {"Origin": str(console.base_url).rstrip("/")}
    assert (await console.post("/console/logout", headers={**cookie, **origin}, data={})).status_code == 401


@pytest.mark.parametrize(
    "session",
    [
        "", ADMIN_TOKEN, f"signed.{ADMIN_TOKEN}", f"issued.{ADMIN_TOKEN}", "signed.", "issued.", "signed.a.b.c",
        f"signed.{token(scope='orders:operate')}", token(scope="orders:operate"),
        f"issued.{token('x' * 40, scope='orders:operate')}", f"issued.{token(algorithm='none', key=None)}", '"',
    ],
)  # fmt: skip
async def test_only_a_signed_session_counts(console: httpx.AsyncClient, session: str) -> None:
    """Whatever else is in the cookie leads to the login, as no cookie does."""
    answer = await console.get("/console", headers={"Cookie": f"{COOKIE}={session}"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/login?next=%2Fconsole")


async def test_a_changed_session_is_none(console: httpx.AsyncClient) -> None:
    """A byte of its signature or of its content makes the difference."""
    await log_in(console)
    session = console.cookies[COOKIE]
    for place in (len("signed.") + 40, len(session) - 10):
        changed = session[:place] + ("A" if session[place] != "A" else "B") + session[place + 1 :]
        console.cookies.clear()
        answer = await console.get("/console", headers={"Cookie": f"{COOKIE}={changed}"})
        assert answer.status_code == 303


async def test_a_reader_sees_no_page_of_operators(console: httpx.AsyncClient, routes: list[APIRoute]) -> None:
    """Every page and every change but those of its own orders is a 403. The list comes from the routes."""
    await log_in(console, token(scope="orders:read orders:write"))
    operators = [route for route in routes if route.path not in FOR_READERS]
    for address in addresses(operators, "GET"):
        answer = await console.get(address)
        assert (address, answer.status_code) == (address, 403)
        assert "orders:operate" in answer.text
    for address in addresses(operators, "POST"):
        assert (address, (await send(console, address, {})).status_code) == (address, 403)


async def test_nobody_sees_a_page_without_a_session(console: httpx.AsyncClient, routes: list[APIRoute]) -> None:
    """A page leads to the login; a form is refused."""
    for address in addresses(routes, "GET"):
        assert (address, (await console.get(address)).status_code) == (address, 303)
    for address in addresses(routes, "POST"):
        assert (address, (await send(console, address, {})).status_code) == (address, 401)


@pytest.mark.parametrize("origin", [None, "null", "http://elsewhere.example"])
async def test_no_form_of_another_origin_is_accepted(
    console: httpx.AsyncClient, routes: list[APIRoute], origin: str | None
) -> None:
    """Not even with the session of an operator."""
    await log_in(console)
    for address in addresses(routes, "POST"):
        headers = {} if origin is None else {"Origin": origin}
        answer = await console.post(address, data={"reason": "x"}, headers=headers)
        assert (address, answer.status_code) == (address, 403)


async def test_every_form_needs_the_token_of_its_session(console: httpx.AsyncClient, routes: list[APIRoute]) -> None:
    """Without it, a change is refused before it is looked at; so is what is no form."""
    await log_in(console)
    origin = {"Origin": str(console.base_url).rstrip("/")}
    for address in addresses(routes, "POST"):
        for fields in ({}, {"form_token": ""}, {"form_token": "0" * 64}):
            assert (address, (await send(console, address, fields)).status_code) == (address, 403)
        assert (await console.post(address, json={"reason": "x"}, headers=origin)).status_code == 415


async def test_errors_are_pages(console: httpx.AsyncClient) -> None:
    """An unknown page and a method that a page does not have, too; elsewhere they stay problems."""
    for answer, status in (
        (await console.get("/console/nowhere"), 404),
        (await console.get("/console/orders/x/y/z?a=<script>"), 404),
        (await console.delete("/console"), 405),
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
        assert "<script>" not in answer.text
    assert answer.headers["allow"] == "GET, HEAD"
    assert_problem(await console.get("/consoles"), 404, "not-found")
    assert (await console.get("/console/")).headers["location"] == "/console"


async def test_pages_allow_nothing_from_elsewhere(console: httpx.AsyncClient) -> None:
    """No inline script or style, no frame, no cache; a form still tells its origin."""
    await log_in(console)
    for path in ("/console", "/console/login", "/console/nowhere"):
        headers = (await console.get(path)).headers
        policy = headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"


async def test_a_reader_keeps_to_its_rate_limit(database_url: str) -> None:
    """Its pages count as its other requests do; those of operators do not."""
    async with serving(database_url, rate_limit="2/day", **JWT, **SETTINGS) as console:
        await log_in(console, token(scope="orders:read"))
        statuses = [(await console.get("/console")).status_code for _ in range(3)]
        assert statuses == [403, 403, 429]
        await log_in(console)
        assert {(await console.get("/console")).status_code for _ in range(4)} == {200}


async def test_head_opens_no_stream(console: httpx.AsyncClient) -> None:
    """It answers at once."""
    await log_in(console)
    answer = await console.head("/console?stream=1")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_no_page_shows_another_tenants_order(database_url: str, routes: list[APIRoute]) -> None:
    """Neither the page nor its stream, for any address with the order's id. Its own tenant sees it."""
    async with serving(database_url, **JWT, **SETTINGS) as console:
        order = {"items": [{"sku": SECRET_SKU, "quantity": 1, "unit_price": "9.99"}], "customer_id": SECRET_CUSTOMER}
        scopes = {"Authorization": f"Bearer {token(tenant='acme')}"}
        placed = (await console.post("/orders", json=order, headers=scopes)).raise_for_status().json()
        paths = [address.replace(SOME_ID, placed["id"]) for address in addresses(routes, "GET")]
        paths += [
            f"/console/orders?q={placed['id']}",
            "/console/orders?customer_id=other",
            "/console/orders?tenant=acme",
        ]
        shown: dict[str, str] = {}
        for tenant in ("globex", "acme"):
            await log_in(console, token(tenant=tenant, scope="orders:read"))
            texts = [(await console.get(path, follow_redirects=True)).text for path in paths]
            streams = [await first_events(console, f"{path}{'&' if '?' in path else '?'}stream=1") for path in paths]
            shown[tenant] = "".join([*texts, *streams])
    assert SECRET_SKU in shown["acme"]
    assert shown["acme"].count(SECRET_CUSTOMER) > 2
    assert SECRET_SKU not in shown["globex"]
    assert SECRET_CUSTOMER not in shown["globex"]


async def first_events(console: httpx.AsyncClient, path: str) -> str:
    """Return what a stream sends until it has shown something; the whole answer if it is no live stream."""
    text = ""
    async with console.stream("GET", path) as response:
        async for line in response.aiter_lines():
            text += line
            if line.startswith(("event: problem", "event: expired", "data: {")):
                break
    return text

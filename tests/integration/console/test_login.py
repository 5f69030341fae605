"""Logging in to the console: who gets a session, what its cookie is like, and who gets none."""

import time
from collections.abc import AsyncIterator
from http.cookies import SimpleCookie

import httpx
import pytest

from app.console.sessions import COOKIE, MAX_CHARACTERS, SESSION_SECONDS
from tests.harness.api import assert_problem, serving
from tests.harness.commands import orders
from tests.harness.console import ADMIN_TOKEN, FORM_TOKEN, SETTINGS, log_in, send
from tests.harness.identity import SECRET, token

LOGIN = "/console/login"


@pytest.fixture
async def console(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A console for the admin token and for tokens of an issuer."""
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, **SETTINGS) as client:
        yield client


def cookie_of(answer: httpx.Response) -> SimpleCookie:
    """Return the cookie that an answer sets; empty if it sets none."""
    return SimpleCookie(answer.headers.get("set-cookie", ""))


async def test_the_admin_token_opens_a_session(console: httpx.AsyncClient) -> None:
    """Its cookie ends, no script can read it, other sites' forms do not carry it, and it does not contain the token."""
    assert (await console.get("/console")).headers["location"] == f"{LOGIN}?next=%2Fconsole"
    answer = await log_in(console)
    assert answer.headers["location"] == "/console"
    cookie = cookie_of(answer)[COOKIE]
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "lax", "/console")
    assert 0 < int(cookie["max-age"]) <= SESSION_SECONDS
    assert not cookie["secure"]  # on this machine there is no HTTPS
    assert ADMIN_TOKEN not in cookie.value
    page = (await console.get("/console")).raise_for_status()
    assert "admin-token" in page.text
    assert ADMIN_TOKEN not in page.text


@pytest.mark.parametrize(
    ("scope", "first_page"),
    [
        ("orders:operate", "/console"),
        ("orders:read", "/console/orders"),
        ("orders:read orders:write", "/console/orders"),
    ],
)
async def test_a_token_of_the_issuer_opens_a_session(console: httpx.AsyncClient, scope: str, first_page: str) -> None:
    """It lasts as long as the token. A reader starts at its orders."""
    answer = await log_in(console, token(scope=scope, exp=time.time() + 100))
    assert answer.headers["location"] == first_page
    assert 0 < int(cookie_of(answer)[COOKIE]["max-age"]) <= 100


@pytest.mark.parametrize(
    "given",
    [
        "",
        ADMIN_TOKEN[:-1],
        ADMIN_TOKEN + "x",
        token("another secret of more than 32 bytes"),
        token(exp=time.time() - 1),
        token(scope="orders:write"),
        token(scope="orders:read", tenant=None),
        "é\x00",
        "x" * (MAX_CHARACTERS + 1),
    ],
)
async def test_any_other_token_is_refused(console: httpx.AsyncClient, given: str) -> None:
    """The form comes again and says why, without the token."""
    answer = await send(console, LOGIN, {"token": given, "next": "/console"})
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text
    assert not given.strip() or given not in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "origin", [None, "", "null", "http://elsewhere.example", "http://127.0.0.1:1", "http://[", "https://127.0.0.1.evil"]
)
async def test_a_form_of_another_origin_does_not_log_in(console: httpx.AsyncClient, origin: str | None) -> None:
    """Nobody can log somebody else's browser in (OWASP, "Login CSRF")."""
    headers = {} if origin is None else {"Origin": origin}
    answer = await console.post(LOGIN, data={"token": ADMIN_TOKEN}, headers=headers)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


async def test_elsewhere_than_here_the_cookie_is_for_https(console: httpx.AsyncClient) -> None:
    """Behind a proxy with TLS the cookie is `Secure`; over plain HTTP the form says that it needs HTTPS."""
    form, host = {"token": ADMIN_TOKEN}, {"Host": "orders.example"}
    answer = await console.post(LOGIN, data=form, headers={**host, "Origin": "https://orders.example"})
    assert (answer.status_code, cookie_of(answer)[COOKIE]["secure"]) == (303, True)
    answer = await console.post(LOGIN, data=form, headers={**host, "Origin": "http://orders.example"})
    assert (answer.status_code, "HTTPS" in answer.text) == (400, True)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        ("/console/audit?since=1h", "/console/audit?since=1h"),
        ("/console?x=1", "/console?x=1"),
        *dict.fromkeys(
            [
                "https://evil.example/console", "//evil.example/console", "/\\evil.example", "javascript:alert(1)",
                "/consoles", "/orders", "//[", "/console\r\nSet-Cookie: a=b", "",
            ],
            "/console",
        ).items(),
    ],
)  # fmt: skip
async def test_the_login_leads_only_to_the_console(console: httpx.AsyncClient, wanted: str, target: str) -> None:
    """Whatever the address says, the next page is one of ours."""
    page = (await console.get(LOGIN, params={"next": wanted})).raise_for_status()
    assert "evil.example" not in page.text
    answer = await send(console, LOGIN, {"token": ADMIN_TOKEN, "next": wanted})
    assert answer.headers["location"] == target


async def test_logging_out_takes_the_cookie(console: httpx.AsyncClient) -> None:
    """It needs the form's token, so no other site can do it."""
    await log_in(console)
    page = await console.get("/console")
    found = FORM_TOKEN.search(page.text)
    assert found
    assert (await send(console, "/console/logout", {"form_token": "0" * 64})).status_code == 403
    answer = await send(console, "/console/logout", {"form_token": found[1]})
    assert answer.headers["location"] == LOGIN
    assert COOKIE not in console.cookies
    assert (await console.get("/console")).headers["location"].startswith(LOGIN)


async def test_without_the_setting_there_is_no_console(database_url: str) -> None:
    """Its addresses are unknown, as any other."""
    async with serving(database_url, admin_token=ADMIN_TOKEN) as client:
        for path in ("/console", LOGIN, "/console/orders"):
            assert_problem(await client.get(path), 404, "not-found")


async def test_a_console_that_nobody_can_enter_is_refused(database_url: str) -> None:
    """Without the admin token and an issuer, the service ends with exit code 2 and names the setting."""
    code, _, err = await orders("serve", console="true", roles="api", database_url=database_url)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("orders: ORDERS_CONSOLE needs ORDERS_ADMIN_TOKEN")

"""The console as its tests start it, log in to it, and send its forms."""

import html
import re
from collections.abc import Mapping

import httpx
from playwright.async_api import Page

ADMIN_TOKEN = "the-admin-token-of-the-tests"
SETTINGS: Mapping[str, str] = {"console": "true", "admin_token": ADMIN_TOKEN}
ENVIRONMENT = {f"ORDERS_{name.upper()}": value for name, value in SETTINGS.items()}  # of a process
FORM_TOKEN = re.compile(r'name="form_token" value="([^"]*)"')


async def log_in(client: httpx.AsyncClient, token: str = ADMIN_TOKEN) -> httpx.Response:
    """Log in: the client keeps the session's cookie. AssertionError if the token is refused."""
    answer = await send(client, "/console/login", {"token": token, "next": ""})
    assert answer.status_code == httpx.codes.SEE_OTHER, answer.text
    return answer


async def log_in_by_form(page: Page, token: str = ADMIN_TOKEN) -> None:
    """Log in with a browser; it then shows the first page for this token."""
    await page.goto("/console/login")
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Log in").click()
    await page.wait_for_url(lambda url: "/console/login" not in url)


async def change(client: httpx.AsyncClient, path: str, fields: Mapping[str, str], shown_at: str = "") -> httpx.Response:
    """Send a form with the token of the session, as the page `shown_at` (or else the login's) has it."""
    page = (await client.get(shown_at or "/console")).raise_for_status().text
    found = FORM_TOKEN.search(page)
    assert found, page
    return await send(client, path, {**fields, "form_token": html.unescape(found[1])})


async def send(client: httpx.AsyncClient, path: str, fields: Mapping[str, str]) -> httpx.Response:
    """Send a form as a browser does from a page of the same origin, and follow no redirect."""
    origin = str(client.base_url).rstrip("/")
    return await client.post(path, data=dict(fields), headers={"Origin": origin}, follow_redirects=False)

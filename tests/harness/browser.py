"""A real browser for tests of pages. What a browser complains of fails the test, and so does a request to elsewhere.

Each test has a Chromium of its own: to start one takes a fifth of a second.
"""

import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.async_api import (
    Browser,
    BrowserContext,
    BrowserType,
    ConsoleMessage,
    Page,
    Playwright,
    Request,
    WebError,
    async_playwright,
    expect,
)

from tests.harness.wait import AMPLE_SECONDS

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
REMEDY = (
    "Chromium is not installed: run scripts/install-servers, or `apt-get install chromium-headless-shell`, "
    "or `.venv/bin/playwright install --with-deps --only-shell chromium`"
)
# Tests run as root, too, and show only our own pages. No other name is resolved, so a request that fails the test does
# not leave the machine either.
OPTIONS = ("--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
OWN_HOSTS = {"127.0.0.1", "localhost"}
WIDTH, HEIGHT = 1280, 900
NARROW = 320  # WCAG 2.2, success criterion 1.4.10
DISCONNECTED = r"net::ERR_"  # what Chromium logs when the service dies under a page

# Says which elements make the page wider than the window; one in a box that scrolls by itself does not.
FIND_PROTRUDING = """() => {
    const wide = document.documentElement.scrollWidth;
    if (wide <= window.innerWidth) return [];
    const scrolls = (e) => e && e !== document.body
        && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
    return [`the page is ${wide} px wide`, ...[...document.body.querySelectorAll('*')]
        .filter((e) => e.getBoundingClientRect().right > window.innerWidth && !scrolls(e.parentElement))
        .map((e) => e.cloneNode(false).outerHTML)];
}"""
RUN_AXE = "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"


class Visitors:
    """The browser of a test, and what it complained of."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._expected: list[str] = []
        self._complaints: list[str] = []

    async def page(
        self,
        base_url: str,
        *,
        width: int = WIDTH,
        scheme: Literal["light", "dark"] = "light",
        scripts: bool = True,
    ) -> Page:
        """Open the page of a new visitor, without cookies; its paths are relative to `base_url`."""
        context = await self._browser.new_context(
            base_url=base_url,
            viewport={"width": width, "height": HEIGHT},
            color_scheme=scheme,
            java_script_enabled=scripts,
            service_workers="block",
        )
        context.set_default_timeout(AMPLE_SECONDS * 1000)
        self._listen(context)
        return await context.new_page()

    def expect(self, pattern: str) -> None:
        """Accept complaints in which this regular expression is found."""
        self._expected.append(pattern)

    def complaints(self) -> list[str]:
        """Return what the browser complained of, without what is expected."""
        return [text for text in self._complaints if not any(re.search(one, text) for one in self._expected)]

    def _listen(self, context: BrowserContext) -> None:
        context.on("request", self._note_request)
        context.on("console", self._note_message)
        context.on("weberror", self._note_error)

    def _note_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"about", "blob", "data"} and parts.hostname not in OWN_HOSTS:
            self._complaints.append(f"a request left the host: {request.url}")

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:  # violations of the policy are errors
            self._complaints.append(f"{message.type}: {message.text} ({message.location['url']})")

    def _note_error(self, error: WebError) -> None:
        self._complaints.append(f"exception: {error.error}")


@contextlib.asynccontextmanager
async def visiting() -> AsyncIterator[Visitors]:
    """Start a browser; AssertionError at the end if it complained."""
    expect.set_options(timeout=AMPLE_SECONDS * 1000)
    async with open_browser() as browser:
        visitors = Visitors(browser)
        yield visitors
        complaints = visitors.complaints()
        assert complaints == [], complaints


@contextlib.asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """Start a browser. Raises FileNotFoundError, which says what to install."""
    async with async_playwright() as playwright:
        browser = await _launch(playwright)
        try:
            yield browser
        finally:
            await browser.close()


async def _launch(playwright: Playwright) -> Browser:
    return await playwright.chromium.launch(executable_path=find_chromium(playwright.chromium), args=[*OPTIONS])


def find_chromium(chromium: BrowserType) -> str:
    """Return the path of the installed program. Raises FileNotFoundError."""
    own = Path(chromium.executable_path)
    found = next(filter(None, map(shutil.which, PROGRAMS)), None) or (str(own) if own.exists() else None)
    if found is None:
        raise FileNotFoundError(REMEDY)
    return found


async def check_axe(page: Page, schemes: Iterable[Literal["light", "dark"]] = ("light", "dark")) -> None:
    """AssertionError if axe finds a violation in the page as it is now, in these colour schemes."""
    # The policy forbids scripts of others in the page; the browser's debugger may still run one.
    await page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    for scheme in schemes:
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        violations = [_explain(violation) for violation in await page.evaluate(RUN_AXE)]
        assert violations == [], f"{page.url}, {scheme}"


def _explain(violation: dict[str, Any]) -> str:
    nodes = "; ".join(f"{node['html']} ({node['failureSummary']})" for node in violation["nodes"])
    return f"{violation['id']}: {violation['help']}: {nodes}"


async def no_sideways_scroll(page: Page, width: int = NARROW) -> None:
    """AssertionError, with what protrudes, if the page is wider than a window of this width."""
    before = page.viewport_size
    await page.set_viewport_size({"width": width, "height": HEIGHT})
    assert await page.evaluate(FIND_PROTRUDING) == [], f"{page.url} at {width} px"
    if before is not None:
        await page.set_viewport_size(before)

"""Make the pictures of the console and the playground in `docs/images`: a demo, a small story, a browser.

Run it after a change of a page: `make screenshots`.
"""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
from playwright.async_api import Browser

from app import db
from tests.harness import story
from tests.harness.browser import HEIGHT, WIDTH, open_browser
from tests.harness.story import Story

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 150_000
MAX_HEIGHT = 1100
SETTLED_MILLISECONDS = 2500  # by then a stream has sent what is new
BUSY_ORDERS = 60
BUSY_PAUSE_SECONDS = 0.3
DEMO = ("demo", "--ephemeral", "--port", "0", "--sandbox-port", "0", "--playground-port", "0")
URLS = {
    "console": re.compile(rb"(http://\S+)/console\b"),
    "sandbox": re.compile(rb"sandbox +(http://\S+)"),
    "database": re.compile(rb"(postgresql://\S+)"),
    "playground": re.compile(rb"(http://\S+\?token=\S+)"),
}


@contextlib.asynccontextmanager
async def demo() -> AsyncIterator[Mapping[str, str]]:
    """Run the demo; lend its addresses."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "app",
        *DEMO,
        env={**env, **{f"ORDERS_{name.upper()}": value for name, value in story.SETTINGS.items()}},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        printed, found = b"", dict[str, re.Match[bytes] | None]()
        while not (found and all(found.values())):
            line = await process.stdout.readline() if process.stdout else b""
            if not line:
                raise RuntimeError(f"the demo ended, or did not print its addresses: {printed.decode()}")
            printed += line
            found = {name: pattern.search(printed) for name, pattern in URLS.items()}
        yield {name: match[1].decode() for name, match in found.items() if match}
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def pictures(urls: Mapping[str, str], told: Story) -> Sequence[tuple[str, str]]:
    """Return the name of each picture, and its address."""
    console = f"{urls['console']}/console"
    return (
        ("console-overview", console),
        ("console-overview-dark", console),
        ("console-orders", f"{console}/orders"),
        ("console-order", f"{console}/orders/{told.stuck}"),
        ("console-order-confirmed", f"{console}/orders/{told.confirmed[0]}"),
        ("console-dead-letters", f"{console}/dead-letters"),
        ("console-outbox", f"{console}/outbox"),
        ("console-partners", f"{console}/partners"),
        ("console-audit", f"{console}/audit"),
        ("playground", urls["playground"]),
    )


async def take(browser: Browser, name: str, address: str) -> None:
    """Take one picture. Raises RuntimeError if the page cannot be loaded."""
    page = await browser.new_page(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="dark" if name.endswith("-dark") else "light"
    )
    answer = await page.goto(address)
    if answer is None or not answer.ok:
        raise RuntimeError(f"{address} answers {answer and answer.status}")
    if name == "playground":
        for button in ("10 orders", "Kill the service"):
            await page.get_by_role("button", name=button, exact=True).click()
        await page.get_by_text("restarted once").or_(page.get_by_text("is back")).first.wait_for()
    await page.wait_for_timeout(SETTLED_MILLISECONDS)
    height = min(await page.evaluate("document.body.scrollHeight"), MAX_HEIGHT)
    content = b""
    while not 0 < len(content) <= MAX_BYTES:  # of a long page, less must do
        await page.set_viewport_size({"width": WIDTH, "height": height})
        content = await page.screenshot(animations="disabled")
        height = height * 9 // 10
    await page.close()
    (IMAGES / f"{name}.png").write_bytes(content)
    sys.stdout.write(f"docs/images/{name}.png  {len(content) // 1000} kB\n")


async def keep_busy(service: httpx.AsyncClient) -> None:
    """Place orders one after the other, for about twenty seconds."""
    for number in range(BUSY_ORDERS):
        await story.place(service, *story.BOUGHT[number % len(story.BOUGHT)], key=f"busy-{number}")
        await asyncio.sleep(BUSY_PAUSE_SECONDS)


async def main() -> None:
    """Take every picture."""
    IMAGES.mkdir(exist_ok=True)
    async with demo() as urls, open_browser() as browser:
        watching = await browser.new_page()  # the first page keeps its history only while somebody watches
        await watching.goto(f"{urls['console']}/console")
        async with (
            db.open_pool(urls["database"], 2) as pool,
            httpx.AsyncClient(base_url=urls["console"], timeout=60) as service,
            httpx.AsyncClient(base_url=urls["sandbox"], timeout=60) as sandbox,
        ):
            await keep_busy(service)
            told = await story.tell(service, sandbox, pool)
        for name, address in pictures(urls, told):
            await take(browser, name, address)


if __name__ == "__main__":
    asyncio.run(main())

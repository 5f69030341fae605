"""The pages for a browser: served by the service alone, without inline scripts or styles."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from html.parser import HTMLParser

import httpx
import pytest

from tests.harness.api import serving
from tests.harness.sandboxes import plain_http

TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png"}


class Page(HTMLParser):
    """The files a page loads, its links, and its inline parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.inline: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._open = tag
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes and tag != "a"]
        self.links += [attributes["href"]] if tag == "a" else []
        self.inline += [f"{tag} {name}" for name in attributes if name == "style" or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._open in {"script", "style"} and data.strip():
            self.inline.append(data)

    def handle_endtag(self, _: str) -> None:
        self._open = ""


Opened = Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(params=["service", "sandbox"])
def opened(request: pytest.FixtureRequest, database_url: str, sandbox_url: str) -> Opened:
    """Serve the service or the sandbox."""

    @asynccontextmanager
    async def service() -> AsyncIterator[httpx.AsyncClient]:
        async with serving(database_url) as client:
            yield client

    @asynccontextmanager
    async def sandbox() -> AsyncIterator[httpx.AsyncClient]:
        async with plain_http(sandbox_url) as client:
            yield client

    return {"service": service, "sandbox": sandbox}[request.param]


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_page_loads_only_files_of_the_service(opened: Opened, path: str) -> None:
    """It works without internet access, and under a policy that allows nothing inline."""
    async with opened() as client:
        answer = (await client.get(path)).raise_for_status()
        assert answer.headers["content-type"].startswith("text/html")
        assert "'unsafe" not in answer.headers["content-security-policy"]
        page = Page(answer.text)
        assert page.inline == []
        assert page.loads
        for asset in page.loads:
            assert asset.startswith("/")
            loaded = (await client.get(asset)).raise_for_status()
            assert loaded.content
            assert loaded.headers["content-type"].startswith(TYPES[asset[asset.rindex(".") :]])
            assert not re.search(rb"url\(['\"]?(?:https?:)?//|@import", loaded.content) or asset.endswith(".js")


async def test_every_link_of_the_landing_page_works(opened: Opened) -> None:
    """Each link answers 200."""
    async with opened() as client:
        page = (await client.get("/", headers={"Host": "a&b'c"})).text
        assert "a&b'c" not in page
        assert "http://a&amp;b&#x27;c" in page
        links = Page(page).links
        assert {"/docs", "/openapi.json", "/livez"} <= set(links)
        for link in links:
            (await client.get(link)).raise_for_status()


async def test_the_docs_show_this_server_s_document(opened: Opened) -> None:
    """Swagger UI loads the OpenAPI document of the same server."""
    async with opened() as client:
        script = (await client.get("/docs/swagger-initializer.js")).text
        assert 'url: "/openapi.json"' in script
        assert '"validatorUrl": null' in script
        assert (await client.get("/docs/nothing.js")).status_code == 404

"""The playground of a running demo, as a browser without scripts uses it."""

import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator
from html import unescape
from http import HTTPStatus

import httpx

from tests.harness.processes import Service
from tests.harness.wait import AMPLE_SECONDS, wait_until

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # spares loading certificates for each client


def find_address(demo: Service) -> str:
    """Return the address with the token, which the demo prints before any other."""
    found: str = re.findall(r"http://\S+", demo.log.read_text())[0]
    return found


def read_fragment(page: str, name: str) -> str:
    """Return the text of a fragment of a page, without tags and with single spaces."""
    section = page.partition(f'<section id="{name}"')[2].partition(">")[2].partition("</section>")[0]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", section)).split())


class Playground:
    """A browser that has opened the playground. `origin`: the address of its pages."""

    def __init__(self, http: httpx.AsyncClient, origin: str, form_token: str) -> None:
        self.http = http
        self.origin = origin
        self.form_token = form_token

    async def press(self, button: str, **headers: str) -> httpx.Response:
        """Send the form of a button."""
        form = {"form_token": self.form_token, "do": button}
        return await self.http.post("/", data=form, headers={"Origin": self.origin, **headers})

    async def pressed(self, *buttons: str) -> None:
        """Press these buttons, one after the other; AssertionError if one is refused."""
        for button in buttons:
            response = await self.press(button)
            assert response.status_code == HTTPStatus.SEE_OTHER, response.text

    async def fragment(self, name: str) -> str:
        """Return the text of a fragment, as the page shows it now."""
        return read_fragment((await self.http.get("/")).raise_for_status().text, name)

    async def until_shown(self, name: str, *texts: str) -> str:
        """Wait until the fragment has all of these texts, and return it."""
        seen = ""

        async def is_shown() -> bool:
            nonlocal seen
            seen = await self.fragment(name)
            return all(text in seen for text in texts)

        try:
            await wait_until(is_shown, AMPLE_SECONDS, f"{texts} in {name}")
        except AssertionError as error:
            error.add_note(seen)
            raise
        return seen

    async def stream(self) -> AsyncIterator[tuple[str, str]]:
        """Yield the id and the HTML of each fragment that the stream sends."""
        async with self.http.stream("GET", "/?stream=1") as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    fragment = json.loads(line.removeprefix("data: "))
                    yield fragment["id"], fragment["html"]


@contextlib.asynccontextmanager
async def playing(demo: Service) -> AsyncIterator[Playground]:
    """Open the playground with its token."""
    url = httpx.URL(find_address(demo))
    origin = f"{url.scheme}://{url.netloc.decode()}"
    async with httpx.AsyncClient(base_url=origin, timeout=60, verify=NO_TLS, trust_env=False) as http:
        assert (await http.get(url)).headers["Location"] == "/"
        page = (await http.get("/")).raise_for_status().text
        yield Playground(http, origin, re.findall(r'name="form_token" value="(\w+)"', page)[0])

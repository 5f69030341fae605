"""The HTTP client of the partners: which connection a request gets, and where a response ends."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app.errors import PartnerUnavailable
from app.partners.http import MAX_HEAD_BYTES, HttpClient, Interrupted, NotConnected, Reply, Target
from app.partners.ledger import MAX_PAGE_BYTES, LedgerClient
from tests.harness.wait import AMPLE_SECONDS, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LIMIT = 1000


class Server:
    """Answers each request with `answer`, and keeps the heads, by connection."""

    def __init__(self) -> None:
        self.url = ""
        self.answer = OK
        self.closes = False
        self.heads: list[list[bytes]] = []
        self.ended = 0  # connections
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        heads: list[bytes] = []
        self.heads.append(heads)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                await self.say(self.answer, writer)
                if self.closes:
                    writer.close()
        self.ended += 1

    async def say(self, data: bytes, writer: asyncio.StreamWriter | None = None) -> None:
        to = writer or self._writers[-1]
        to.write(data)
        await to.drain()

    def sockets(self) -> "list[socket.socket]":
        return [writer.get_extra_info("socket")._sock for writer in self._writers]  # noqa: SLF001 - asyncio lends it

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    async with await asyncio.start_server(found.serve, "127.0.0.1", 0, limit=2 * MAX_HEAD_BYTES) as listening:
        found.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield found
        found.hang_up()


async def get(http: HttpClient, url: str, path: str = "/", **fields: str) -> Reply:
    target = Target.parse(url)
    async with asyncio.timeout(AMPLE_SECONDS):
        return await http.exchange(target, target.request("GET", path, fields, None), AMPLE_SECONDS, LIMIT)


async def test_a_connection_is_kept_and_used_again(server: Server) -> None:
    """Requests at the same time have connections of their own."""
    async with HttpClient() as http:
        assert await get(http, server.url) == Reply(200, {"content-length": "2"}, b"{}")
        await get(http, server.url)
        assert [len(heads) for heads in server.heads] == [2]
        await asyncio.gather(*(get(http, server.url) for _ in range(3)))
        assert len(server.heads) == 3


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"Content-Length", b"Connection: close\r\nContent-Length"),
        OK.replace(b"1.1", b"1.0"),
        OK + b"HTTP/1.1 200 OK\r\n",  # bytes that no request asked for
        OK.replace(b"2\r\n\r\n{}", b"2000\r\n\r\n" + b" " * 2000),  # more than the limit
    ],
    ids=["close", "1.0", "more bytes", "too large"],
)
async def test_a_connection_that_cannot_be_trusted_is_not_used_again(server: Server, answer: bytes) -> None:
    """What is left of this response must not become the next one."""
    server.answer = answer
    async with HttpClient() as http:
        assert (await get(http, server.url)).status == 200
        server.answer = OK
        await get(http, server.url)
    assert [len(heads) for heads in server.heads] == [1, 1]


async def test_a_connection_that_the_server_closed_is_not_used_again(server: Server) -> None:
    """It closed before the next request, so nothing is lost."""
    async with HttpClient() as http:
        await get(http, server.url)
        server.hang_up()
        await wait_until(lambda: server.ended == 1, AMPLE_SECONDS, "the end of the connection")
        await get(http, server.url)
    assert len(server.heads) == 2


async def test_a_connection_is_kept_for_a_limited_time(server: Server) -> None:
    """It is closed by then, also if no further request comes."""
    async with HttpClient(keep_seconds=0.05) as http:
        await get(http, server.url)
        await wait_until(lambda: server.ended == 1, AMPLE_SECONDS, "the close")
        await get(http, server.url)
    assert len(server.heads) == 2


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1", b"1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", b"until the end"),
    ],
    ids=["interim", "chunked", "no content", "until the end"],
)
async def test_a_response_ends_where_http_says(server: Server, answer: bytes, body: bytes) -> None:
    """RFC 9112, section 6.3."""
    server.answer, server.closes = answer, b"close" in answer
    async with HttpClient() as http:
        reply = await get(http, server.url)
    assert (reply.status, reply.body) == (204 if b" 204 " in answer else 200, body)
    assert "link" not in reply.headers


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD_BYTES + 1),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * (MAX_HEAD_BYTES + 1),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\nConnection: upgrade\r\n\r\n",
        b"220 mail ESMTP\r\n",
        b"",
    ],
    ids=["short", "short chunk", "large head", "large trailer", "upgrade", "mail", "nothing"],
)
async def test_anything_else_is_interrupted(server: Server, answer: bytes) -> None:
    """The partner may have done what it was asked."""
    server.answer, server.closes = answer, True
    async with HttpClient() as http:
        with pytest.raises(Interrupted):
            await get(http, server.url)


async def test_a_cancelled_request_takes_its_connection_with_it(server: Server) -> None:
    """Its late answer cannot become the answer to another request."""
    server.answer = b""
    async with HttpClient() as http:
        late = asyncio.create_task(get(http, server.url))
        await wait_until(lambda: server.heads and server.heads[0], AMPLE_SECONDS, "the request")
        late.cancel()
        await asyncio.wait([late])
        server.answer = OK
        assert (await get(http, server.url)).status == 200
    assert len(server.heads) == 2


async def test_a_url_may_have_a_path_and_credentials(server: Server) -> None:
    """The credentials leave in a field, and are in no text that is shown."""
    async with HttpClient() as http:
        url = server.url.replace("//", "//me:p%40ss@") + "/base/"
        await get(http, url, "/v1")
    [[head]] = server.heads
    assert head.startswith(b"GET /base/v1 HTTP/1.1\r\n")
    assert b"Authorization: Basic bWU6cEBzcw==\r\n" in head
    assert Target.parse(url).url == f"{server.url}/base"


async def test_an_unrequested_response_answers_no_request(server: Server) -> None:
    """Not even if it has arrived, but has not been read, when the next request takes the connection."""
    async with HttpClient() as http:
        await get(http, server.url)
        extra = server.sockets()[0].dup()
        with extra:
            extra.sendall(OK.replace(b"{}", b"no"))  # the event loop does not run in between
        assert (await get(http, server.url)).body == b"{}"
    assert len(server.heads) == 2


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("http://bücher.example/sp ace", "xn--bcher-kva.example", "/sp%20ace"),
        ("http://[::1]:8000", "[::1]:8000", ""),
        ("https://h:443/a%20b/", "h:443", "/a%20b"),
    ],
)
def test_a_url_is_written_in_ascii(url: str, host: str, path: str) -> None:
    """As browsers do; what is escaped already stays so."""
    target = Target.parse(url)
    assert (target.path, f"Host: {host}\r\n" in target.fields) == (path, True)


async def test_a_value_that_would_end_its_field_is_refused(server: Server) -> None:
    """A value cannot add fields or requests."""
    async with HttpClient() as http:
        with pytest.raises(ValueError, match="key"):
            await get(http, server.url, key="a\r\nother: b")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_tls_is_verified(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, make_tls: Callable[[Path], ssl.SSLContext], *, is_trusted: bool
) -> None:
    """By the system's certificates, and those of SSL_CERT_FILE. A request is sent to a verified partner only."""
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    found = Server()
    async with await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=make_tls(certificate)) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with HttpClient() as http:
            if is_trusted:
                assert (await get(http, url)).body == b"{}"
            else:
                with pytest.raises(NotConnected):
                    await get(http, url)
        found.hang_up()
    assert sum(map(len, found.heads)) == is_trusted


@pytest.fixture
def make_tls() -> Callable[[Path], ssl.SSLContext]:
    def make(certificate: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        return context

    return make


async def test_a_ledger_page_that_is_too_large_is_no_answer(server: Server) -> None:
    """It must not look like a partner without a ledger."""
    server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_PAGE_BYTES + 1)
    server.answer += b" " * (MAX_PAGE_BYTES + 1)
    async with HttpClient() as http:
        with pytest.raises(PartnerUnavailable, match="too large"):
            await LedgerClient(http, server.url, AMPLE_SECONDS).exists()

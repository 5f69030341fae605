"""A client of a partner that breaks the contract raises nothing, trusts nothing and repeats nothing."""

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from uuid import UUID

import pytest

from app.partners.client import MAX_REPLY_BYTES, PartnerClient
from app.partners.http import HttpClient
from app.partners.payment import HttpPayment
from app.partners.ports import Done, NotSent, PartnerHealth, Refused, Unknown
from tests.harness.sandboxes import Partners, charge_of
from tests.harness.wait import AMPLE_SECONDS, wait_until

PAID = b'{"payment_id": "pay_1"}'


class ScriptedPartner:
    """A server that answers with its script, then repeats the last entry, and stores the requests."""

    def __init__(self, script: Sequence[Iterable[bytes]], *, closes: bool) -> None:
        self.script = list(script)
        self.requests: list[bytes] = []
        self.url = ""
        self._closes = closes
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                self.requests.append(await self._request(reader))
                for part in self.script[min(len(self.requests), len(self.script)) - 1]:
                    writer.write(part)
                    await writer.drain()
                if self._closes:
                    writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        return head + await reader.readexactly(int(lengths[0]) if lengths else 0)

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


def answer(status: int, body: bytes = b"{}", *headers: str) -> list[bytes]:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers, "", ""]
    return ["\r\n".join(lines).encode() + body]


@contextlib.asynccontextmanager
async def partner(*script: Iterable[bytes], closes: bool = False) -> AsyncIterator[ScriptedPartner]:
    scripted = ScriptedPartner(script, closes=closes)
    async with await asyncio.start_server(scripted.serve, "127.0.0.1", 0) as server:
        scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield scripted
        scripted.hang_up()


Pay = Callable[..., Any]


@pytest.fixture
def charge(partners_at: Callable[..., Partners], saga: UUID) -> Pay:
    async def pay(url: str, timeout_seconds: float = 20.0) -> Any:
        return await partners_at(url, timeout_seconds).payment.charge(charge_of(saga, 1, "USD", None))

    return pay


async def test_agreed_answers_are_done_or_refused(charge: Pay) -> None:
    async with partner(answer(201, PAID), answer(402, b'{"code": "card-declined"}')) as other:
        assert await charge(other.url) == Done({"payment_id": "pay_1"})
        assert await charge(other.url) == Refused("card-declined")


async def test_reply_has_only_the_agreed_fields(charge: Pay) -> None:
    async with partner(answer(201, b'{"payment_id": "pay_1", "more": "\\u0000"}')) as other:
        assert await charge(other.url) == Done({"payment_id": "pay_1"})


@pytest.mark.parametrize(
    "script",
    [
        answer(200, PAID),
        answer(202, PAID),
        answer(201, b""),
        answer(201, b"{}"),
        answer(201, b"[]"),
        answer(201, b'"pay_1"'),
        answer(201, b"<html>"),
        answer(201, b"\xff\xfe\x00"),
        answer(201, b"[" * 60_000),
        answer(201, b'{"payment_id": 7}'),
        answer(201, b'{"payment_id": ""}'),
        answer(201, b'{"payment_id": "pay\\u0000"}'),
        answer(201, b'{"payment_id": "\\ud800"}'),
        answer(201, json.dumps({"payment_id": "p" * 201}).encode()),
        answer(201, json.dumps({"payment_id": "pay_1", "pad": "x" * MAX_REPLY_BYTES}).encode()),
        answer(201, gzip.compress(PAID), "Content-Encoding: gzip"),
        answer(402, b'{"code": "out-of-stock"}'),
        answer(402, b'{"code": ["card-declined"]}'),
        answer(402, b"card-declined"),
        answer(409, b'{"code": "card-declined"}'),
        answer(409, b'{"code": "undone"}'),
        answer(404),
        answer(429),
        answer(500),
        answer(599),
        [b"HTTP/1.1 201 Created\r\nContent-Length: 9000\r\n\r\n" + PAID],
        [b"HTTP/1.1 201 Created\r\nContent-Length: x\r\n\r\n" + PAID],
        [b"HTTP/1.1 two\x00hundred\r\n\r\n"],
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [b"\x00" * 100],
        [],
    ],
    ids=lambda _: "",
)
async def test_other_answers_are_unknown(charge: Pay, script: Iterable[bytes]) -> None:
    """The detail of an unknown outcome is text that Postgres can store."""
    async with partner(script, closes=True) as other:
        outcome = await charge(other.url)
    assert isinstance(outcome, Unknown)
    assert outcome.detail.isprintable()
    assert len(other.requests) == 1


@pytest.mark.parametrize(
    ("status", "our_fault"),
    [
        *((status, True) for status in (400, 401, 402, 403, 404, 405, 410, 413, 415, 422, 499)),
        *((status, False) for status in (302, 408, 409, 425, 429, 500, 503)),
    ],
)
async def test_rejected_request_is_our_fault(charge: Pay, status: int, *, our_fault: bool) -> None:
    """A 4xx about the request itself means a defect of this service."""
    async with partner(answer(status)) as other:
        outcome = await charge(other.url)
    assert outcome == Unknown(f"{status} unexpected answer", our_fault=our_fault)


@pytest.mark.parametrize(
    ("script", "health"),
    [
        *((answer(status), PartnerHealth.WORKING) for status in (400, 401, 402, 403, 404, 409, 422)),
        *((answer(status), PartnerHealth.FAILING) for status in (302, 408, 425, 429, 500, 503)),
        ([], PartnerHealth.FAILING),
        *((answer(status, b"<html>"), PartnerHealth.BROKEN) for status in (200, 201)),
        (answer(200), PartnerHealth.BROKEN),  # readable, but not as agreed
    ],
)
async def test_health_of_an_unclear_answer(charge: Pay, script: Iterable[bytes], health: PartnerHealth) -> None:
    async with partner(script, closes=True) as other:
        outcome = await charge(other.url)
    assert (outcome.health, outcome.alarming) == (health, outcome.our_fault or health is PartnerHealth.BROKEN)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(charge: Pay, status: int) -> None:
    async with partner() as other:
        other.script = [answer(status, b"{}", f"Location: {other.url}/elsewhere")]
        assert isinstance(await charge(other.url), Unknown)
        assert len(other.requests) == 1


@pytest.mark.parametrize(
    ("script", "done"),
    [
        (answer(200), True),
        (answer(200, b""), True),
        (answer(202), True),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], True),
        (answer(200, b"<html>"), False),
        (answer(302), False),
        (answer(404), False),
    ],
)
async def test_readable_2xx_is_done_for_an_undo(
    partners_at: Callable[..., Partners], saga: UUID, script: Iterable[bytes], *, done: bool
) -> None:
    async with partner(script) as other:
        assert isinstance(await partners_at(other.url).payment.refund(charge_of(saga)), Done if done else Unknown)


@pytest.mark.parametrize(("value", "seconds"), [("0", 0), ("7", 7), ("9" * 400, 300)])
async def test_retry_after_in_seconds_is_bounded(charge: Pay, value: str, seconds: float) -> None:
    async with partner(answer(503, b"{}", f"Retry-After: {value}")) as other:
        assert await charge(other.url) == Unknown("503 unexpected answer", seconds)


@pytest.mark.parametrize(("away", "low", "high"), [(-86400, 0, 0), (100, 60, 100), (86400, 300, 300)])
async def test_retry_after_as_a_date_is_bounded(charge: Pay, away: float, low: float, high: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=away), usegmt=True)
    async with partner(answer(503, b"{}", f"Retry-After: {date}")) as other:
        outcome = await charge(other.url)
    assert low <= outcome.retry_after_seconds <= high


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "", "Thu, 99 Foo 2026 99:00:00 GMT"])
async def test_invalid_retry_after_is_none(charge: Pay, value: str) -> None:
    async with partner(answer(503, b"{}", f"Retry-After: {value}")) as other:
        assert await charge(other.url) == Unknown("503 unexpected answer")


async def test_endless_answer_stops_at_the_size_limit(charge: Pay) -> None:
    head = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    async with partner(itertools.chain([head], itertools.repeat(chunk))) as other:
        assert await charge(other.url) == Unknown("201 unreadable answer")


async def test_slow_answer_is_unknown_at_the_deadline(charge: Pay) -> None:
    async with partner(answer(201, PAID), [b"HTTP/1.1 201 Created\r\nContent-Length: 99\r\n\r\n{"]) as other:
        assert isinstance(await charge(other.url), Done)  # leaves its connection to the next call
        assert await charge(other.url, timeout_seconds=0.2) == Unknown("no answer within 0.2 s")


async def test_refused_connection_is_not_sent(charge: Pay) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        outcome = await charge(f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert isinstance(outcome, NotSent)


async def test_connection_timeout_is_not_sent(charge: Pay) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # Linux drops connections while the accept queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(full.getsockname())

        async def is_not_sent() -> bool:
            """A call that stalled past both deadlines, for connecting and for the whole call, is unknown."""
            return isinstance(await charge(f"http://127.0.0.1:{full.getsockname()[1]}", timeout_seconds=0.4), NotSent)

        await wait_until(is_not_sent, AMPLE_SECONDS, "a call that is not sent")


async def test_unresolvable_name_is_not_sent(charge: Pay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the resolver finds nothing, or the name cannot be one: a label has at most 63 characters."""
    assert isinstance(await charge(f"http://{'a' * 64}.invalid"), NotSent)

    def find_nothing(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", find_nothing)
    outcome = await charge("http://payment.invalid")
    assert isinstance(outcome, NotSent)
    assert "no such name" in outcome.detail


@pytest.mark.parametrize("url", ["http://", "nonsense", "ftp://127.0.0.1"])
async def test_invalid_address_is_not_sent(charge: Pay, url: str) -> None:
    assert isinstance(await charge(url), NotSent)


async def test_call_on_a_dead_kept_connection_is_unknown(charge: Pay) -> None:
    """The client never repeats a call on its own."""
    async with partner(answer(201, PAID), []) as other:
        assert isinstance(await charge(other.url), Done)
        call = asyncio.create_task(charge(other.url))
        await wait_until(lambda: len(other.requests) == 2, AMPLE_SECONDS, "the second request")
        other.hang_up()
        assert isinstance(await call, Unknown)
        assert len(other.requests) == 2


async def test_no_cookies_and_no_proxy_of_the_environment(charge: Pay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with partner(answer(201, PAID, "Set-Cookie: a=b; Path=/")) as other:
        assert isinstance(await charge(other.url), Done)
        assert isinstance(await charge(other.url), Done)
    assert b"cookie" not in other.requests[1].lower()


async def test_extra_headers_cannot_replace_the_key(partner_http: HttpClient, saga: UUID) -> None:
    async with partner(answer(201, PAID)) as other:
        extra = {"traceparent": "00-1-2-01", "Idempotency-Key": "other"}
        payment = HttpPayment(PartnerClient(partner_http, other.url + "/", 20, extra_headers=lambda: extra))
        await payment.charge(charge_of(saga, 1, "USD", None))
    [request] = other.requests
    assert request.startswith(b"POST /v1/payments/charge HTTP/1.1")
    assert b"traceparent: 00-1-2-01" in request
    assert f"Idempotency-Key: {saga}:charge_payment".encode() in request
    assert b"other" not in request


async def test_defect_in_the_client_is_an_outcome(saga: UUID) -> None:
    async with HttpClient() as http:
        payment = HttpPayment(PartnerClient(http, "http://127.0.0.1:1", 5))
    outcome = await payment.charge(charge_of(saga, 1, "USD", None))
    assert outcome == Unknown("RuntimeError: the HTTP client is closed", our_fault=True)


async def test_cancelled_call_raises(charge: Pay) -> None:
    async with partner([]) as other:
        call = asyncio.create_task(charge(other.url))
        await wait_until(lambda: other.requests, AMPLE_SECONDS, "the request")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


@pytest.mark.parametrize(
    ("script", "state"),
    [
        (answer(200, b'{"state": "charged"}'), "charged"),
        (answer(404), None),
        (answer(200, b'{"state": "lost"}'), Unknown("200 unexpected answer")),
        (answer(200, b'{"state": []}'), Unknown("200 unexpected answer")),
        (answer(200, b"?"), Unknown("200 unreadable answer")),
        (answer(503, b"{}", "Retry-After: 2"), Unknown("503 unexpected answer", 2.0)),
    ],
)
async def test_query_returns_a_state_none_or_unknown(
    partners_at: Callable[..., Partners], saga: UUID, script: Iterable[bytes], state: str | Unknown | None
) -> None:
    async with partner(script) as other:
        assert await partners_at(other.url).payment.state(saga) == state


async def test_query_without_a_connection_is_unknown(partners_at: Callable[..., Partners], saga: UUID) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert isinstance(await partners_at(url).payment.state(saga), Unknown)

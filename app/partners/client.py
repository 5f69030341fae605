"""One HTTP attempt at a partner, and what came of it; nothing that a partner or the network does ever raises.

Only what provably never left (no connection) is `NotSent`, only the agreed answers are `Done` and `Refused`.
Everything else is `Unknown`, which is always safe: every call may be sent again with its key.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from json import loads
from typing import Any

import aiohttp

from app.partners.ports import Done, NotSent, Outcome, PartnerHealth, Refused, Unknown

MAX_REPLY_BYTES = 64 * 1024
MAX_TEXT_CHARACTERS = 200
MAX_RETRY_AFTER_SECONDS = 300.0  # longer, and a partner's slip could put an undo off until nobody believes in it

# Of the 4xx, those that say nothing about the request: the partner has too much to do, or is at it already.
NOT_NOW = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})

NEVER_LEFT = (
    aiohttp.ClientConnectorError,  # no route, refused, no such name, TLS failed
    aiohttp.ClientConnectorCertificateError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the answers to one operation mean. Whatever is neither done nor refused by it is unknown.

    Done is `status` (None: any 2xx, as an undo is answered) with the text fields of `reply` in a JSON object.
    Refused are the pairs of status and code in `refusals`. `409 undone`, the answer to a do whose undo came
    first, is neither: the saga has turned back since, and a late call of its past must count for nothing.
    """

    status: int | None
    reply: tuple[str, ...] = ()
    refusals: Collection[tuple[int, str]] = ()

    def done_by(self, status: int) -> bool:
        """Whether a status says that it was done."""
        if self.status is None:
            return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
        return status == self.status


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; `body` is None where it is not one JSON object of an acceptable size."""

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any] | None

    @property
    def retry_after_seconds(self) -> float | None:
        """The partner's wish to be left alone for so long, if it stated one."""
        return _retry_after(self.headers.get("Retry-After"))

    @property
    def health(self) -> PartnerHealth:
        """What it tells of the partner, given that it was not agreed on."""
        if HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES:
            return PartnerHealth.BROKEN
        at_fault = HTTPStatus.BAD_REQUEST <= self.status < HTTPStatus.INTERNAL_SERVER_ERROR
        return PartnerHealth.WORKING if at_fault and self.status not in NOT_NOW else PartnerHealth.FAILING


def open_session() -> aiohttp.ClientSession:
    """The connections that all partners share; the caller closes it. Needs a running event loop."""
    return aiohttp.ClientSession(
        # Sagas in flight are bounded where they are started: a second queue here would eat their deadlines.
        # Idle connections go before servers close theirs (uvicorn: after 5 s), or calls would run into that.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        # A small answer that unpacks into a large one would escape the size limit.
        auto_decompress=False,
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


class PartnerClient:
    """Calls one partner at `base_url`: a call ends within `timeout_seconds`, connecting within half of it.

    `extra_headers` is asked before each call, for trace propagation.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        timeout_seconds: float,
        extra_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        # aiohttp would round its own total up to whole seconds; the deadline around each attempt is exact.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=timeout_seconds / 2)
        self._extra_headers = extra_headers

    async def call(self, path: str, key: str, body: Mapping[str, Any], agreed: Agreement) -> Outcome:
        """Send `body` once with its Idempotency-Key; aiohttp by itself repeats a GET, but never a POST."""
        answer = await self.attempt("POST", path, {"Idempotency-Key": key}, json=body)
        return _judged(answer, agreed) if isinstance(answer, Answer) else answer

    async def state(self, path: str, states: Collection[str]) -> str | Unknown | None:
        """What the partner says of a saga: one of `states`, or None: never seen. Unknown: it did not say."""
        answer = await self.attempt("GET", path, {})
        if not isinstance(answer, Answer):
            return Unknown(answer.detail)
        state = (answer.body or {}).get("state")
        if answer.status == HTTPStatus.OK and isinstance(state, str) and state in states:
            return state
        return None if answer.status == HTTPStatus.NOT_FOUND else _unknown(answer)

    async def attempt(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        *,
        json: Mapping[str, Any] | None = None,
        form: Mapping[str, str] | None = None,
    ) -> Answer | NotSent | Unknown:
        """Send one request, with a body as JSON or as a form, for the caller to judge the answer."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._exchange(method, path, headers, json, form)
        except NEVER_LEFT as error:
            return NotSent(_described(error))
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Unknown(_described(error))
        except Exception as error:  # noqa: BLE001 - the attempt is on record and needs an outcome, whatever broke
            return Unknown(_described(error), our_fault=True)

    async def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        json: Mapping[str, Any] | None,
        form: Mapping[str, str] | None,
    ) -> Answer:
        async with self._session.request(
            method,
            self._base_url + path,
            json=json,
            data=form,
            headers={**self._extra_headers(), **headers},
            timeout=self._timeout,
            allow_redirects=False,
        ) as response:
            raw = bytearray()
            async for chunk in response.content.iter_any():
                raw += chunk
                if len(raw) > MAX_REPLY_BYTES:
                    break
            # An undo or a commit may be answered by its status alone; what is there must be what was agreed.
            body_of_answer = _json_object(raw) if raw else {}
            return Answer(response.status, response.headers, body_of_answer)


def _judged(answer: Answer, agreed: Agreement) -> Outcome:
    body = answer.body
    if body is None:
        return _unknown(answer)
    if agreed.done_by(answer.status) and all(is_text(body.get(name)) for name in agreed.reply):
        return Done({name: body[name] for name in agreed.reply})
    code = body.get("code")
    if isinstance(code, str) and (answer.status, code) in agreed.refusals:
        return Refused(code)
    return _unknown(answer)


def _unknown(answer: Answer) -> Unknown:
    code = (answer.body or {}).get("code")
    what = "unreadable answer" if answer.body is None else code if is_text(code) else "unexpected answer"
    # A conflict is about the saga's state; anything else about our credentials, address or body, and no retry mends it.
    our_fault = answer.health is PartnerHealth.WORKING and answer.status != HTTPStatus.CONFLICT
    return Unknown(f"{answer.status} {what}", answer.retry_after_seconds, our_fault, answer.health)


def is_text(value: Any) -> bool:
    """Whether a field is short, printable text, as ids and codes are (PostgreSQL cannot even store a NUL)."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT_CHARACTERS and value.isprintable()


def _json_object(raw: bytearray) -> Mapping[str, Any] | None:
    if len(raw) > MAX_REPLY_BYTES:
        return None
    try:
        value = loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _retry_after(value: str | None) -> float | None:
    """RFC 9110, section 10.2.3: seconds, or a date. None for what is neither."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(value)
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _described(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"[:MAX_TEXT_CHARACTERS]
    return "".join(each if each.isprintable() else "?" for each in text)

"""Send one HTTP request to a partner and return its outcome. No failure of a partner or of the network raises.

Only a request that provably never left (no connection) is `NotSent`; only the agreed answers are `Done` and `Refused`.
Everything else is `Unknown`. That is always safe, because every call can be repeated with its key.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from json import dumps, loads
from typing import Any
from urllib.parse import urlencode

from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from app.observability.signals import Signals
from app.partners.http import HttpClient, Interrupted, NotConnected, Target
from app.partners.ports import Done, NotSent, Outcome, PartnerHealth, Refused, Unknown
from app.values import immutable

MAX_REPLY_BYTES = 64 * 1024
MAX_TEXT_CHARACTERS = 200
MAX_RETRY_AFTER_SECONDS = 300.0  # a longer value is probably a partner's mistake, and would delay an undo for too long

# The 4xx statuses that do not blame the request: the partner is overloaded, or is still processing it.
NOT_NOW = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})


@immutable
class Agreement:
    """The agreed answers of one operation. Any other answer is unknown.

    Done is `status` (None: any 2xx, as for undos) with the text fields of `reply` in a JSON object. Refused are the
    pairs of status and code in `refusals`. `409 undone`, the answer to a do whose undo came first, is neither: the
    saga is compensating by then, and a late call must change nothing.
    """

    status: int | None
    reply: tuple[str, ...] = ()
    refusals: Collection[tuple[int, str]] = ()

    def means_done(self, status: int) -> bool:
        """Return whether the status means that the operation was done."""
        if self.status is None:
            return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
        return status == self.status


@immutable
class Answer:
    """A complete HTTP answer. `body` is None unless it is one JSON object of an acceptable size."""

    status: int
    headers: Mapping[str, str]  # by names in lower case
    body: Mapping[str, Any] | None

    @property
    def retry_after_seconds(self) -> float | None:
        """Return how long the partner asks us to wait; None if it does not say."""
        return _parse_retry_after(self.headers.get("retry-after"))

    @property
    def health(self) -> PartnerHealth:
        """Return what an answer outside the contract says about the partner."""
        if HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES:
            return PartnerHealth.BROKEN
        blames_us = HTTPStatus.BAD_REQUEST <= self.status < HTTPStatus.INTERNAL_SERVER_ERROR
        return PartnerHealth.WORKING if blames_us and self.status not in NOT_NOW else PartnerHealth.FAILING


class PartnerClient:
    """Calls one partner at `base_url`. A call ends within `timeout_seconds`; connecting may take half of that.

    `extra_headers` is called before each request, for trace propagation. `signals`: for the span of each request.
    """

    def __init__(
        self,
        http: HttpClient,
        base_url: str,
        timeout_seconds: float,
        extra_headers: Callable[[], Mapping[str, str]] = dict,
        signals: Signals | None = None,
    ) -> None:
        self._http = http
        self._target = Target.parse(base_url)
        self._server: dict[str, AttributeValue] = {  # attributes of spans, by the conventions for HTTP
            "server.address": self._target.host,
            "server.port": self._target.port,
        }
        self._timeout_seconds = timeout_seconds
        self._extra_headers = extra_headers
        self._signals = signals or Signals()

    async def call(self, path: str, key: str, body: Mapping[str, Any], agreed: Agreement) -> Outcome:
        """Send `body` once with its Idempotency-Key."""
        answer = await self.attempt("POST", path, {"Idempotency-Key": key}, json=body)
        return _interpret(answer, agreed) if isinstance(answer, Answer) else answer

    async def state(self, path: str, states: Collection[str]) -> str | Unknown | None:
        """Return the partner's state of a saga: one of `states`, None if it never saw it, Unknown if it did not say."""
        answer = await self.attempt("GET", path, {})
        if not isinstance(answer, Answer):
            return Unknown(answer.detail)
        state = (answer.body or {}).get("state")
        if answer.status == HTTPStatus.OK and isinstance(state, str) and state in states:
            return state
        return None if answer.status == HTTPStatus.NOT_FOUND else _make_unknown(answer)

    async def attempt(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        *,
        json: Mapping[str, Any] | None = None,
        form: Mapping[str, str] | None = None,
    ) -> Answer | NotSent | Unknown:
        """Send one request with a JSON or a form body, and return the answer for the caller to interpret."""
        attributes = {"http.request.method": method, "url.full": self._target.url + path, **self._server}
        with self._signals.span(method, SpanKind.CLIENT, attributes) as span:
            answer = await self._attempt(method, path, headers, json, form)
            _describe_answer(span, answer)
            return answer

    async def _attempt(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        json: Mapping[str, Any] | None,
        form: Mapping[str, str] | None,
    ) -> Answer | NotSent | Unknown:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._exchange(method, path, headers, json, form)
        except NotConnected as error:
            return NotSent(_printable(str(error)))
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds:g} s")
        except Interrupted as error:
            return Unknown(_printable(str(error)))
        except Exception as error:  # noqa: BLE001 - a recorded attempt needs an outcome, even after a defect
            return Unknown(_describe(error), our_fault=True)

    async def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        json: Mapping[str, Any] | None,
        form: Mapping[str, str] | None,
    ) -> Answer:
        fields, body = {**self._extra_headers(), **headers}, None
        if json is not None:
            fields["Content-Type"], body = "application/json", dumps(json).encode()
        elif form is not None:
            fields["Content-Type"], body = "application/x-www-form-urlencoded", urlencode(form).encode()
        request = self._target.request(method, path, fields, body)
        reply = await self._http.exchange(self._target, request, self._timeout_seconds / 2, MAX_REPLY_BYTES)
        # An undo or a commit may be answered without a body; a body must be valid.
        return Answer(reply.status, reply.headers, _parse_object(reply.body) if reply.body else {})


def _describe_answer(span: Span, answer: Answer | NotSent | Unknown) -> None:
    """Record the answer on the client span. A status of 400 or more is an error, and so is no answer."""
    if isinstance(answer, Answer):
        span.set_attribute("http.response.status_code", answer.status)
        if answer.status >= HTTPStatus.BAD_REQUEST:
            span.set_attribute("error.type", str(answer.status))
            span.set_status(Status(StatusCode.ERROR))
    else:
        span.set_attribute("error.type", "not-sent" if isinstance(answer, NotSent) else "unknown")
        span.set_status(Status(StatusCode.ERROR, answer.detail))


def _interpret(answer: Answer, agreed: Agreement) -> Outcome:
    body = answer.body
    if body is None:
        return _make_unknown(answer)
    if agreed.means_done(answer.status) and all(is_text(body.get(name)) for name in agreed.reply):
        return Done({name: body[name] for name in agreed.reply})
    code = body.get("code")
    if isinstance(code, str) and (answer.status, code) in agreed.refusals:
        return Refused(code)
    return _make_unknown(answer)


def _make_unknown(answer: Answer) -> Unknown:
    code = (answer.body or {}).get("code")
    reason = "unreadable answer" if answer.body is None else code if is_text(code) else "unexpected answer"
    # A 409 is about the saga's state. Other errors are about our credentials, address or body, so no retry can succeed.
    our_fault = answer.health is PartnerHealth.WORKING and answer.status != HTTPStatus.CONFLICT
    return Unknown(f"{answer.status} {reason}", answer.retry_after_seconds, our_fault, answer.health)


def is_text(value: Any) -> bool:
    """Return whether a field is short, printable text, as ids and codes are (PostgreSQL cannot store a NUL)."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT_CHARACTERS and value.isprintable()


def _parse_object(raw: bytes) -> Mapping[str, Any] | None:
    if len(raw) > MAX_REPLY_BYTES:
        return None
    try:
        value = loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse_retry_after(value: str | None) -> float | None:
    """Parse Retry-After: seconds or a date (RFC 9110, section 10.2.3). Return None if it is neither."""
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


def _describe(error: Exception) -> str:
    return _printable(f"{type(error).__name__}: {error}")


def _printable(text: str) -> str:
    text = text[:MAX_TEXT_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in text)

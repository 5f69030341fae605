"""A message, whatever transport carries it: a CloudEvents 1.0 event.

`type` is `orders.<routing key>.v<version>`; `id` is the outbox row's id, the same on every resend; `sequence` is the
version of the event's `subject`, so a consumer can recognise an outdated resend.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from app.messaging.topology import routing_key
from app.observability.traces import limit_tracestate
from app.values import immutable

SOURCE = "/orders"
SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/json"
LINE_LENGTH = 500  # characters of a reason: enough to search the logs for, too short for a traceback
UNDECODABLE = "x-undecodable"  # header that names the properties which could not be decoded
HEADER_PREFIX = "cloudEvents_"  # AMQP binding: attribute names get this prefix, as `cloudEvents:` is no valid JMS name


# Header of a dead letter that was replayed: the trace context of the operator's request, if it has one.
REPLAYED_BY = "x-replayed-by"


class UnreadableMessage(ValueError):
    """The message is not one of our events; retrying cannot help."""


class JsonText(Mapping[str, Any]):
    """The data of an event as JSON text, parsed only when a handler of this process reads it.

    The text is written once, with the order's response, and goes into the outbox and to the broker as it is.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def _parsed(self) -> Mapping[str, Any]:
        parsed: Mapping[str, Any] = json.loads(self.text)
        return parsed

    def __getitem__(self, name: str) -> Any:
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed)

    def __len__(self) -> int:
        return len(self._parsed)


@immutable
class Envelope:
    """One event. `replayed_by`: of a dead letter that was replayed; see `REPLAYED_BY`."""

    id: UUID
    type: str
    subject: str
    sequence: int
    tenant: str
    time: datetime
    data: Mapping[str, Any]
    traceparent: str | None = None
    tracestate: str | None = None
    replayed_by: str | None = None

    @property
    def routing_key(self) -> str:
        """The routing key of the event's type."""
        return routing_key(self.type)

    def log_fields(self) -> dict[str, str]:
        """Return what every log line about the event shows. A foreign message may hold any text."""
        return {"event_id": str(self.id), "order_id": one_line(self.subject), "tenant": one_line(self.tenant)}

    def body(self) -> bytes:
        """The data alone (binary content mode), as JSON."""
        return self.json().encode()

    def json(self) -> str:
        """The data as JSON text."""
        if isinstance(self.data, JsonText):
            return self.data.text
        return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))

    def headers(self) -> dict[str, str]:
        """The attributes as transport headers, with the W3C trace context beside them."""
        attributes = {
            "specversion": SPEC_VERSION,
            "id": str(self.id),
            "source": SOURCE,
            "type": self.type,
            "subject": self.subject,
            "time": self.time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "sequence": str(self.sequence),
            "tenant": self.tenant,
        }
        headers = {HEADER_PREFIX + name: value for name, value in attributes.items()}
        if self.traceparent:
            headers["traceparent"] = self.traceparent
        if self.tracestate:
            headers["tracestate"] = limit_tracestate(self.tracestate)
        return headers


def parse(headers: Mapping[str, Any], body: bytes) -> Envelope:
    """Parse a message. Raises UnreadableMessage with the reason."""
    if UNDECODABLE in headers:
        raise UnreadableMessage(f"its properties cannot be decoded: {_text(headers[UNDECODABLE])}")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply for the parser
        raise UnreadableMessage(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UnreadableMessage("the body is not a JSON object")
    try:
        return Envelope(
            id=UUID(_attribute(headers, "id")),
            type=_attribute(headers, "type"),
            subject=_attribute(headers, "subject"),
            sequence=int(_attribute(headers, "sequence")),
            tenant=_attribute(headers, "tenant"),
            time=_instant(_attribute(headers, "time")),
            data=data,
            traceparent=_text(headers.get("traceparent")),
            tracestate=limit_tracestate(_text(headers.get("tracestate")) or "") or None,
            replayed_by=_text(headers.get(REPLAYED_BY)),
        )
    except ValueError as error:
        raise UnreadableMessage(f"its attributes cannot be read: {error}") from error


def _attribute(headers: Mapping[str, Any], name: str) -> str:
    value = _text(headers.get(HEADER_PREFIX + name))
    if not value:
        raise ValueError(f"{HEADER_PREFIX}{name} is missing")
    return value


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"{HEADER_PREFIX}time has no offset from UTC")
    return instant


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)


def one_line(text: str) -> str:
    """Return a short printable line: columns, headers and terminals accept neither NUL, nor surrogates, nor 128 KiB."""
    return "".join(char if char.isprintable() else " " for char in text[:LINE_LENGTH])

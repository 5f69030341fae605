"""W3C trace context: read from headers, pass on in headers, keep within its size limit."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry import context, propagate

TRACESTATE_BYTES = 512
TRACESTATE_MEMBER_BYTES = 128


def trace_headers() -> dict[str, str]:
    """Return W3C `traceparent` (and `tracestate`) of the current context; empty outside of a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def limit_tracestate(tracestate: str) -> str:
    """Return whole members of a `tracestate` header, at most 512 bytes.

    Members over 128 bytes are dropped first, then members from the end (W3C Trace Context, section 3.3.1.5). Without a
    limit, a caller could exceed the header limit of every partner, which would then refuse charges and refunds.
    """
    members = [member.strip() for member in tracestate.split(",") if member.strip()]
    if len(",".join(members).encode()) > TRACESTATE_BYTES:
        members = [member for member in members if len(member.encode()) <= TRACESTATE_MEMBER_BYTES]
    while len(",".join(members).encode()) > TRACESTATE_BYTES:
        members.pop()
    return ",".join(members)


@contextlib.contextmanager
def trace_context(carrier: Mapping[str, Any]) -> Iterator[None]:
    """Continue the trace named by `traceparent` / `tracestate` in the carrier, if it names one."""
    given = {name: value for name, value in carrier.items() if value}
    if "tracestate" in given:
        given["tracestate"] = limit_tracestate(given["tracestate"])
    token = context.attach(propagate.extract(given))
    try:
        yield
    finally:
        context.detach(token)

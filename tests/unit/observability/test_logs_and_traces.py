"""Logs and traces: exceptions show no secret, and `tracestate` has a size limit."""

import logging
from uuid import uuid4

import pytest
import structlog
from opentelemetry import baggage, context

from app.observability.logs import configure_logging
from app.observability.traces import limit_tracestate, trace_context, trace_headers


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_logged_exception_shows_no_local_variable(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A logged exception shows where it was raised, but no local variable."""
    secret = str(uuid4())
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging(log_format, "INFO")
    try:
        fail(secret)
    except ValueError:
        structlog.get_logger("test").exception("it.failed")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    logged = capsys.readouterr().err
    assert "it.failed" in logged
    assert "in fail" in logged or '"name": "fail"' in logged
    assert secret not in logged


def fail(authorization: str) -> None:
    assert authorization
    raise ValueError("wrong")


@pytest.mark.parametrize(
    ("given", "limited"),
    [
        ("", ""),
        (" a=1 ,, b=2,", "a=1,b=2"),
        ("a=" + "x" * 510, "a=" + "x" * 510),  # fits as it is
        ("a=" + "x" * 510 + ",b=2", "b=2"),
        (",".join(["a=1", "b=" + "x" * 126, "c=" + "x" * 127, "d=" + "x" * 400]), "a=1,b=" + "x" * 126),
        (",".join(f"v{number}={'x' * 100}" for number in range(9)), ",".join(f"v{n}={'x' * 100}" for n in range(4))),
        ("ä=" + "ü" * 255, ""),
    ],
)
def test_a_tracestate_keeps_whole_members_to_512_bytes(given: str, limited: str) -> None:
    """Large members are dropped first, then members from the end."""
    assert limit_tracestate(given) == limited


def test_baggage_is_not_passed_on() -> None:
    """Only the trace context of a caller goes into rows, messages and calls to partners."""
    carrier = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
    with trace_context(carrier):
        token = context.attach(baggage.set_baggage("customer", "secret"))
        try:
            assert trace_headers() == carrier
        finally:
            context.detach(token)


@pytest.mark.parametrize("header", ["traceparent", "tracestate"])
def test_a_malformed_trace_header_is_not_logged(header: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A caller cannot fill the log with warnings of the library."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    valid = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    bad = {"traceparent": "0" * 600, "tracestate": "Ü=1,=,a"}
    configure_logging("json", "INFO")
    try:
        with trace_context({**valid, header: bad[header]}):
            pass
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert capsys.readouterr().err == ""

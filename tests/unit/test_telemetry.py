"""What is logged: enough to find a fault, and nothing that is secret."""

import logging
from uuid import uuid4

import pytest
import structlog

from app.telemetry import configure_logging


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_logged_exception_shows_where_it_was_raised_but_no_local_variable(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
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

"""Structured logs, written by a thread so that a slow log reader never blocks the event loop."""

import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import structlog
from opentelemetry import trace
from prometheus_client import Counter
from structlog.typing import EventDict

from app.observability import log_fields

# No local variables, which structlog would show: they hold credentials, tokens, addresses and keys.
JSON = json.JSONEncoder(default=repr)  # made once: `json.dumps` with options makes one for each line
TRACEBACK = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


LOG_QUEUE_LINES = 4096
LOG_BATCH_LINES = 256
GATHER_SECONDS = 0.01
LOG_FLUSH_SECONDS = 1.0  # at the exit, if the reader stalls
# One counter per process, as logging is per process; each registry shows it.
LOG_LINES_DROPPED = Counter("log_lines_dropped", "Log lines that their reader was too slow for", registry=None)


class LineHandler(logging.Handler):
    """Writes lines: the libraries', which come as records, and ours, which do not. Drops and counts what it cannot."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a value cannot be formatted, so it cannot be logged either
            self.drop(1)
        else:
            self.write(line)

    def write(self, line: str) -> None:
        """Write a line."""
        raise NotImplementedError

    def drop(self, lines: int) -> None:
        """Count lines that are not written."""
        LOG_LINES_DROPPED.inc(lines)


class ForegroundHandler(LineHandler):
    """Writes to a stream at once."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, line: str) -> None:
        """Write a line."""
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # the reader closed its end, or this process the stream
            self.drop(1)


class BackgroundHandler(LineHandler):
    """Writes to a file descriptor from a separate thread, so that a stalled reader delays only the log.

    If its reader stalls, a pipe accepts 64 KiB, then blocks the writer. The caller formats each line, because only it
    has the context; the lines wait in a bounded queue. When the queue is full, lines are dropped and counted, and the
    number is logged once there is room.

    The thread lets lines gather for GATHER_SECONDS before it writes them: each time it wakes up it takes the
    interpreter from the event loop, which under load happened for every line.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._lines: deque[str] = deque()
        self._some = threading.Event()  # set while lines wait, or are being written
        self._dropped = 0  # not reported yet
        self._dropping = threading.Lock()
        threading.Thread(target=self._write_all, name="log-writer", daemon=True).start()

    def write(self, line: str) -> None:
        """Queue the line, or drop it."""
        if len(self._lines) >= LOG_QUEUE_LINES:
            self.drop(1)
            return
        self._lines.append(line)
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Wait until all lines are written, at most LOG_FLUSH_SECONDS. `logging` calls it at the exit."""
        deadline = time.monotonic() + LOG_FLUSH_SECONDS
        while (self._some.is_set() or self._lines) and time.monotonic() < deadline:
            _pause(0.005)

    def drop(self, lines: int) -> None:
        """Count lines that are not written, and report them later."""
        with self._dropping:
            self._dropped += lines
        super().drop(lines)

    def _write_all(self) -> None:
        while True:
            self._some.wait()
            _pause(GATHER_SECONDS)
            while self._lines:
                self._write_batch([self._lines.popleft() for _ in range(min(LOG_BATCH_LINES, len(self._lines)))])
            self._some.clear()
            if self._lines:  # one came in between
                self._some.set()

    def _write_batch(self, lines: list[str]) -> None:
        reported = self._dropped
        text = [self._report(reported), *lines] if reported else lines
        try:
            _write(self.descriptor, "".join(f"{line}\n" for line in text).encode(errors="backslashreplace"))
        except OSError:  # the reader closed its end
            self.drop(len(lines))
        else:
            with self._dropping:
                self._dropped -= reported

    def _report(self, dropped: int) -> str:
        message = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": "log.lines_dropped: %d"}
        return self.format(logging.makeLogRecord({**message, "args": (dropped,)}))


class LineLogger:
    """The end of structlog's chain, which gets the finished line.

    Our lines go to the handler directly: records and their formatter made half of the cost of a line.
    """

    def __init__(self, handler: LineHandler, name: str) -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = handler.write


def _pause(seconds: float) -> None:
    """Sleep. `time.sleep` fails under libfaketime, by which the tests of wrong clocks set a process's clock."""
    select.select([], [], [], seconds)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # a terminal or the parent process made the descriptor non-blocking
            select.select([], [descriptor], [])


def configure_logging(log_format: str, level: str, *, background: bool = False) -> None:
    """Send every log line, ours and the libraries', to stderr: as one JSON object, or as readable text (`console`).

    `background`: for servers, which must not wait for the reader of their log.
    """
    shared: list[structlog.typing.Processor] = [
        _add_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
    ]
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(TRACEBACK), _render_json]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    stream = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the process runs
    handler = BackgroundHandler(stream.fileno()) if background else ForegroundHandler(stream)
    structlog.configure(
        processors=[*shared, partial(_render, handler, renderers)],
        logger_factory=partial(LineLogger, handler),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # These libraries log every reconnect and request at INFO or WARNING; our own lines cover what matters.
    for noisy in ("aio_pika", "aiormq", "uvicorn", "alembic"):
        logging.getLogger(noisy).setLevel("ERROR" if noisy in {"aio_pika", "aiormq"} else "WARNING")
    # These warn of each malformed `traceparent` or `tracestate`: any caller could fill the log.
    for noisy in ("opentelemetry.trace.propagation.tracecontext", "opentelemetry.trace.span"):
        logging.getLogger(noisy).setLevel("ERROR")


def _add_context(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Add the time, the fields of the task, and the ids of the current span, whether or not its trace is exported."""
    for name, value in log_fields.current().items():
        event.setdefault(name, value)
    event["timestamp"] = f"{datetime.now(UTC).isoformat(timespec='microseconds')[:-6]}Z"
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", trace.format_trace_id(context.trace_id))
        event.setdefault("span_id", trace.format_span_id(context.span_id))
    return event


def _render(
    handler: LineHandler, renderers: Sequence[structlog.typing.Processor], logger: object, method: str, event: EventDict
) -> Any:
    """Return the line. One that cannot be rendered is dropped: a value must not fail the work that logs it."""
    line: Any = event
    try:
        for renderer in renderers:
            line = renderer(logger, method, line)
    except Exception as error:
        handler.drop(1)
        raise structlog.DropEvent from error
    return line


def _render_json(_logger: object, _method: str, event: EventDict) -> str:
    return JSON.encode(event)

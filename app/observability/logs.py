"""Structured logs, written by a thread so that a slow log reader never blocks the event loop."""

import contextlib
import logging
import os
import queue
import select
import sys
import threading
import time

import structlog
from opentelemetry import trace
from prometheus_client import Counter

# No local variables, which structlog would show: they hold credentials, tokens, addresses and keys.
TRACEBACK = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


LOG_QUEUE_LINES = 4096
LOG_BATCH_LINES = 256
LOG_FLUSH_SECONDS = 1.0  # at the exit, if the reader stalls
# One counter per process, as logging is per process; each registry shows it.
LOG_LINES_DROPPED = Counter("log_lines_dropped", "Log lines that their reader was too slow for", registry=None)


class BackgroundHandler(logging.Handler):
    """Writes to a file descriptor from a separate thread, so that a stalled reader delays only the log.

    If its reader stalls, a pipe accepts 64 KiB, then blocks the writer. The caller formats each line, because only it
    has the context; the lines wait in a bounded queue. When the queue is full, lines are dropped and counted, and the
    number is logged once there is room.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(LOG_QUEUE_LINES)
        self._dropped = 0  # not reported yet
        self._dropping = threading.Lock()
        threading.Thread(target=self._write_all, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line, or drop it."""
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # noqa: BLE001 - the queue is full, or a value cannot be formatted: neither can be logged
            self._drop(1)

    def flush(self) -> None:
        """Wait until all lines are written, at most LOG_FLUSH_SECONDS. `logging` calls it at the exit."""
        deadline = time.monotonic() + LOG_FLUSH_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _drop(self, lines: int) -> None:
        with self._dropping:
            self._dropped += lines
        LOG_LINES_DROPPED.inc(lines)

    def _write_all(self) -> None:
        while True:
            lines = [self._lines.get()]
            with contextlib.suppress(queue.Empty):
                while len(lines) < LOG_BATCH_LINES:
                    lines.append(self._lines.get_nowait())
            reported = self._dropped
            text = [self._report(reported), *lines] if reported else lines
            try:
                _write(self.descriptor, "".join(f"{line}\n" for line in text).encode(errors="backslashreplace"))
            except OSError:  # the reader closed its end
                self._drop(len(lines))
            else:
                with self._dropping:
                    self._dropped -= reported
            for _ in lines:
                self._lines.task_done()

    def _report(self, dropped: int) -> str:
        message = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": "log.lines_dropped: %d"}
        return self.format(logging.makeLogRecord({**message, "args": (dropped,)}))


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
        structlog.contextvars.merge_contextvars,
        _add_trace_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(TRACEBACK), structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = _handler(background=background)
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


def _add_trace_ids(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add the ids of the current span, whether or not its trace is exported."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", trace.format_trace_id(context.trace_id))
        event.setdefault("span_id", trace.format_span_id(context.span_id))
    return event


def _handler(*, background: bool) -> logging.Handler:
    if sys.stderr is None:  # closed before the start, so its descriptor may belong to another file by now
        return logging.NullHandler()
    return BackgroundHandler(sys.stderr.fileno()) if background else logging.StreamHandler(sys.stderr)

"""Logs, metrics and trace context. Labels are of low cardinality: never an order id, never a key."""

import contextlib
import itertools
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import structlog
from opentelemetry import context, propagate
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# What orders and sagas can come to, named here so that each series is there from the start.
REJECTIONS = ("out-of-stock", "card-declined", "undeliverable", "hold-expired", "timed-out", "compensated-by-operator")
CANCELS = ("cancelled-by-customer", "compensated-by-operator")
ENDS = (
    ("confirmed", ""),
    *(("rejected", reason) for reason in REJECTIONS),
    *(("cancelled", reason) for reason in CANCELS),
)
STEPS = {
    "do": ("reserve_inventory", "charge_payment", "commit_inventory", "create_shipment"),
    "undo": ("create_shipment", "charge_payment", "reserve_inventory"),
}
OUTCOMES = {"do": ("done", "refused", "not-sent", "unknown"), "undo": ("done", "not-sent", "unknown")}
PARTNERS = ("inventory", "payment", "shipping")
QUEUE = "orders.saga"
PRUNED_TABLES = ("outbox", "inbox", "sagas", "idempotency_keys")
TRACESTATE_BYTES = 512
TRACESTATE_MEMBER_BYTES = 128
SAGA_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)

# Without the values of local variables, which structlog would show: credentials, tokens, addresses and keys are there.
TRACEBACK = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


LOG_QUEUE_LINES = 4096
LOG_BATCH_LINES = 256
LOG_FLUSH_SECONDS = 1.0  # at the exit, for a reader that stalls
# Of the process, as logging is: each registry shows it.
LOG_LINES_DROPPED = Counter("log_lines_dropped", "Log lines that their reader was too slow for", registry=None)


class BackgroundHandler(logging.Handler):
    """Writes to a file descriptor from a thread of its own, so that a reader that stalls stops nothing but the log.

    A pipe takes 64 KiB from a writer whose reader stalls, then blocks it. Lines are formatted by the caller, whose
    context they need, and wait in a bounded queue. When it is full they are dropped, counted, and reported once there
    is room.
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
        except Exception:  # noqa: BLE001 - full, or a value that cannot be formatted: nobody could be told of either
            self._drop(1)

    def flush(self) -> None:
        """Wait until all is written, for LOG_FLUSH_SECONDS at most. `logging` calls it at the exit."""
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
            except OSError:  # the reader is gone
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
        except BlockingIOError:  # whoever opened it, a terminal or a parent, made it non-blocking
            select.select([], [descriptor], [])


def configure_logging(log_format: str, level: str, *, background: bool = False) -> None:
    """Send every log line, ours and the libraries', to stderr: one JSON object each, or for people (`console`).

    `background`: for what serves, and must not wait for whoever reads its log.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
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
    # They tell of every reconnect and request at INFO or WARNING; what matters of it our own lines say.
    for noisy in ("aio_pika", "aiormq", "uvicorn", "alembic"):
        logging.getLogger(noisy).setLevel("ERROR" if noisy in {"aio_pika", "aiormq"} else "WARNING")


def _handler(*, background: bool) -> logging.Handler:
    if sys.stderr is None:  # it was closed before the start, so its number may be another file's by now
        return logging.NullHandler()
    return BackgroundHandler(sys.stderr.fileno()) if background else logging.StreamHandler(sys.stderr)


class Metrics:
    """Every metric of a process, in a registry of its own; each is there from the start, if only at zero."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of no use to anybody
        self.registry = registry = CollectorRegistry()
        self.http_duration = Histogram(
            "http_server_request_duration_seconds",
            "Time from the request's head to the last byte of the answer",
            ["method", "route", "status"],
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.orders_placed = Counter("orders_placed", "Orders accepted", registry=registry)
        self.orders_finished = Counter(
            "orders_finished", "Orders that came to an end here", ["status", "reason"], registry=registry
        )
        for status, reason in ENDS:
            self.orders_finished.labels(status, reason)
        self.idempotent_replays = Counter(
            "idempotency_cache_hits", "Answers replayed from a stored copy", ["source"], registry=registry
        )
        for source in ("postgres", "redis"):
            self.idempotent_replays.labels(source)
        self.idempotency_conflicts = Counter(
            "idempotency_conflicts", "Requests refused because of their key", ["kind"], registry=registry
        )
        for kind in ("reused", "in-progress"):
            self.idempotency_conflicts.labels(kind)
        self._messaging(registry)
        self._sagas(registry)
        registry.register(LOG_LINES_DROPPED)
        self.db_pool_in_use = Gauge("db_pool_in_use", "Connections lent out", registry=registry)

    def _messaging(self, registry: CollectorRegistry) -> None:
        self.outbox_pending = Gauge(
            "outbox_pending",
            "Rows not yet published nor parked, all of them; as of a second ago, or of 10 s while counting takes long",
            registry=registry,
        )
        self.outbox_oldest_pending_age = Gauge(
            "outbox_oldest_pending_age_seconds", "Age of the oldest pending row", registry=registry
        )
        self.outbox_parked = Gauge("outbox_parked", "Rows set aside after too many refusals", registry=registry)
        self.outbox_published = Counter("outbox_published", "Rows confirmed by the broker", registry=registry)
        self.outbox_publish_failed = Counter(
            "outbox_publish_failed",
            "Rows that were not confirmed, once for each try: refused, or in a batch that an outage took",
            registry=registry,
        )
        self.outbox_returned = Counter("outbox_returned", "Messages that no queue took", registry=registry)
        self.consumer_processed = Counter("consumer_processed", "Messages that took effect", registry=registry)
        self.consumer_dedup_hits = Counter(
            "consumer_dedup_hits", "Deliveries of messages that had taken effect before", registry=registry
        )
        self.consumer_failed = Counter("consumer_failed", "Handler failures", registry=registry)
        self.dlq_messages = Counter("dlq_messages", "Messages dead-lettered", registry=registry)
        self.dlq_depth = Gauge("dlq_depth", "Dead letters that wait for an operator", registry=registry)
        self.queue_depth = Gauge("queue_depth", "Messages that wait for a consumer", ["queue"], registry=registry)
        self.queue_depth.labels(QUEUE)
        self.outbox_resent = Counter(
            "outbox_resent", "Published rows made pending again, as their orders had not started", registry=registry
        )
        self.orders_unstarted = Gauge(
            "orders_unstarted", "Orders placed a minute ago or earlier whose saga has not started", registry=registry
        )
        self.pruned = Counter("janitor_pruned", "Rows removed after their retention", ["table"], registry=registry)
        self.prune_failed = Counter(
            "janitor_failures", "Passes that an error ended for a table", ["table"], registry=registry
        )
        for table in PRUNED_TABLES:
            self.pruned.labels(table)
            self.prune_failed.labels(table)

    def _sagas(self, registry: CollectorRegistry) -> None:
        self.saga_in_flight = Gauge(
            "saga_in_flight", "Unfinished sagas, by their order's status", ["status"], registry=registry
        )
        for status in ("pending", "compensating"):
            self.saga_in_flight.labels(status)
        self.saga_oldest_unfinished_age = Gauge(
            "saga_oldest_unfinished_age_seconds", "Age of the oldest unfinished saga", registry=registry
        )
        self.saga_needs_operator = Gauge(
            "saga_needs_operator",
            "Unfinished sagas with an undo that has failed for long, or with a call that no retry mends",
            registry=registry,
        )
        self.partner_circuit_state = Gauge(
            "partner_circuit_state",
            "Whether this process leaves a partner alone: 0 closed, 1 half-open, 2 open",
            ["partner"],
            registry=registry,
        )
        for partner in PARTNERS:
            self.partner_circuit_state.labels(partner)
        self.saga_duration = Histogram(
            "saga_duration_seconds", "Start of a saga to its end", buckets=SAGA_SECONDS, registry=registry
        )
        self.saga_step_duration = Histogram(
            "saga_step_duration_seconds",
            "One call to a partner",
            ["step", "action", "outcome"],
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.inventory_holds_expired = Counter(
            "inventory_holds_expired",
            "Sagas that turned back because their stock was no longer held",
            registry=registry,
        )
        self.compensation_failed = Counter(
            "saga_compensation_failed",
            "Attempts to undo a step that did not succeed",
            ["step"],
            registry=registry,
        )
        for action, steps in STEPS.items():
            for step, outcome in itertools.product(steps, OUTCOMES[action]):
                self.saga_step_duration.labels(step, action, outcome)
        for step in STEPS["undo"]:
            self.compensation_failed.labels(step)


def trace_headers() -> dict[str, str]:
    """W3C `traceparent` (and `tracestate`) of the current context; empty outside of a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def limit_tracestate(tracestate: str) -> str:
    """Return whole members of a `tracestate` header, 512 bytes of them at most.

    Members over 128 bytes go first, then members from the end (W3C Trace Context, section 3.3.1.5). Without a limit, a
    caller could fill the header limit of every partner, which would then refuse to charge and to refund alike.
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

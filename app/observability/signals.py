"""The one seam between the work and its observers: facts, spans and crash points.

A *fact* says what has happened, and is emitted after its commit. Each room declares its own facts, as frozen
subclasses of `Fact`, and its own metrics, which subscribe. Wake-ups subscribe too. A handler cannot make the work fail:
its exceptions are logged.

A *span* is a part of the trace of an order or a request. It exists only where the current trace is sampled.

A *crash point* names a point in the code at which a process may die. Tests pass a function that kills the process or
raises there; in production, nothing happens. No setting can install such a function.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import structlog
from opentelemetry import trace
from opentelemetry.trace import Link, NoOpTracer, Span, SpanKind, Tracer
from opentelemetry.util.types import Attributes

from app.values import immutable

log = structlog.get_logger(__name__)

CrashPoints = Callable[[str], None]
NO_SPAN = contextlib.nullcontext(trace.INVALID_SPAN)
LEVELS = {name.lower(): level for name, level in logging.getLevelNamesMapping().items()}
PLAIN = (int, float, type(None))  # logged as they are


@immutable
class Fact:
    """Something that has happened. With `level` and `event`, it is logged with its fields."""

    level: ClassVar[str | None] = None
    event: ClassVar[str] = ""


AnyFact = TypeVar("AnyFact", bound=Fact)


def never_crash(_: str) -> None:
    """Do nothing at a crash point. Every process outside of tests uses this."""


class Signals:
    """Delivers facts to their subscribers, in the order of subscription, starts spans, and calls crash points."""

    def __init__(self, crash_points: CrashPoints = never_crash) -> None:
        self.crash_point = crash_points
        self.tracer: Tracer = NoOpTracer()
        self._handlers: dict[type[Fact], list[Callable[[Any], None]]] = {}

    def subscribe(self, kind: type[AnyFact], handler: Callable[[AnyFact], None]) -> None:
        """Call `handler` with every fact of exactly this type. It must not block."""
        self._handlers.setdefault(kind, []).append(handler)

    def has_subscriber(self, kind: type[Fact]) -> bool:
        """Return whether anything subscribes to facts of exactly this type."""
        return kind in self._handlers

    def wake(self, wake: Callable[[], None], *kinds: type[Fact]) -> None:
        """Call `wake` after every fact of these types."""
        for kind in kinds:
            self.subscribe(kind, lambda _: wake())

    def span(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] = (),
    ) -> contextlib.AbstractContextManager[Span]:
        """Run a block in a span below the current one, if the current trace is sampled. An exception is its error."""
        if not trace.get_current_span().get_span_context().trace_flags.sampled:
            return NO_SPAN
        return self.tracer.start_as_current_span(name, kind=kind, attributes=attributes, links=links)

    def emit(self, fact: Fact) -> None:
        """Log the fact if its type says so, and call its subscribers. Never raises."""
        if fact.level is not None:
            _log(fact, fact.level)
        for handler in self._handlers.get(type(fact), ()):
            try:
                handler(fact)
            except Exception:
                log.exception("signals.handler_failed", fact=type(fact).__name__)


def _log(fact: Fact, level: str) -> None:
    """Log under the name of the fact's module. The level is checked first: most of the cost is in what it saves."""
    module = type(fact).__module__
    if logging.getLogger(module).isEnabledFor(LEVELS[level]):
        names: tuple[str, ...] = type(fact).__match_args__  # of its fields
        values: dict[str, Any] = {}
        for name in names:
            value = getattr(fact, name)
            values[name] = value if isinstance(value, PLAIN) else str(value)
        getattr(_logger(module), level)(fact.event, **values)


@functools.cache
def _logger(name: str) -> Any:
    return structlog.get_logger(name)

"""Facts about HTTP requests, and their metrics."""

import functools

from prometheus_client import CollectorRegistry, Histogram

from app.observability.exemplars import current_exemplar
from app.observability.signals import Fact, Signals
from app.values import immutable

REQUEST_DURATION = "http_server_request_duration_seconds"
REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@immutable
class RequestServed(Fact):
    """A request was answered, or its client disconnected (status 499)."""

    method: str
    route: str
    status: int
    seconds: float


@immutable
class ServerStopping(Fact):
    """The server accepts no more requests, and waits for those in flight."""


def install_metrics(signals: Signals, registry: CollectorRegistry) -> None:
    """Create the metrics and subscribe them."""
    duration = Histogram(
        REQUEST_DURATION,
        "Time from the request's head to the last byte of the response",
        ["method", "route", "status"],
        buckets=REQUEST_SECONDS,
        registry=registry,
    )

    series = functools.cache(duration.labels)  # there are few, and the library's own look-up takes 3 µs
    series("POST", "/orders", 201)  # the other series start with their first request

    def observe(fact: RequestServed) -> None:
        series(fact.method, fact.route, fact.status).observe(fact.seconds, current_exemplar())

    signals.subscribe(RequestServed, observe)

"""Make the application and its server from settings, and serve."""

import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial

import structlog
from fastapi import FastAPI

from app import bootstrap, db
from app.api import docs, health, openapi, problems
from app.api import tracing as api_tracing
from app.api.facts import ServerStopping
from app.api.middleware import RequestMiddleware
from app.api.ops import actions, dlq, outbox, partners, sagas, stats
from app.api.orders import cancel, listing, place, read, timeline
from app.api.server import http_protocol, listener
from app.bootstrap import RequestState
from app.bootstrap.consumers import queues
from app.bootstrap.workers import LEASING_ROLES
from app.console import audit, dead_letter_actions, dead_letters, home, login, order, orders, overview, route
from app.console import outbox as console_outbox
from app.console import partners as console_partners
from app.console.deps import ConsoleConfig
from app.errors import DatabaseUnavailable
from app.messaging import local
from app.messaging.transport_lease import TransportLease
from app.observability.signals import Signals
from app.observability.tracing import Tracing
from app.settings import Settings

log = structlog.get_logger(__name__)

GC_THRESHOLD = 20_000  # new containers between two collections; Python's own 700 is meant for small programs


def create_app(
    settings: Settings,
    signals: Signals | None = None,
    lease: TransportLease | None = None,
    tracing: Tracing | None = None,
    console: ConsoleConfig | None = None,
) -> FastAPI:
    """Make the application for the roles in `settings`; its lifespan starts and stops them, and ends `tracing`.

    If the caller passes a `lease`, it takes it first, and ends the process when the lease is refused. `console`: that
    of the demo; None: the settings say whether there is one.
    """
    if "api" not in settings.roles:
        console = None
    elif settings.console:
        console = console or ConsoleConfig()
    seam = signals or Signals()
    if tracing is not None:
        seam.tracer = tracing.tracer

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[RequestState]:
        async with contextlib.AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(tracing.shutdown, settings.shutdown_timeout_seconds / 4)
            held = lease or bootstrap.transport_lease(settings)
            yield await bootstrap.build(stack, settings, seam, held, tracing=tracing, console=console)

    app = FastAPI(
        title="Orders",
        version=openapi.VERSION,
        summary="Takes orders and drives each to an end: confirmed, or everything undone.",
        lifespan=lifespan,
        openapi_url="/openapi.json",
        docs_url=None,  # the module `docs` serves the page, from local files and with a policy for its scripts
        redoc_url=None,
        redirect_slashes=False,
        telemetry=api_tracing.NO_FASTAPI_TELEMETRY,
    )
    app.add_middleware(
        RequestMiddleware,
        signals=seam,
        max_in_flight=settings.http_max_in_flight,
        direct=place.router if "api" in settings.roles else None,
    )
    problems.install(app)
    app.include_router(health.router)
    if console is not None:  # before `docs`: the demo's console has a first page of its own
        _include_console(app, console)
    app.include_router(docs.router)
    if "api" in settings.roles:
        for routes in (place, cancel, listing, timeline, read, outbox, stats, dlq, sagas, actions, partners):
            app.include_router(routes.router)
    openapi.install(app, queues())
    api_tracing.install(app, tracing)
    return app


def _include_console(app: FastAPI, console: ConsoleConfig) -> None:
    if console.open_key:
        app.include_router(home.router)
    for pages in (
        login,
        overview,
        orders,
        order,
        dead_letters,
        dead_letter_actions,
        console_outbox,
        console_partners,
        audit,
    ):
        app.include_router(pages.router)
    route.install(app)


def make_server(
    settings: Settings,
    socket_: socket.socket,
    signals: Signals | None = None,
    lease: TransportLease | None = None,
    tracing: Tracing | None = None,
    console: ConsoleConfig | None = None,
) -> listener.Server:
    """Make the application and its server, with the server's connection limits."""
    seam = signals or Signals()
    http = http_protocol.protocol(
        settings.http_header_timeout_seconds, settings.http_answer_timeout_seconds, settings.http_max_connections
    )
    return listener.Server(
        create_app(settings, seam, lease, tracing, console),
        socket_,
        settings.shutdown_timeout_seconds,
        http,
        settings.http_keep_alive_seconds,
        stopping=lambda: seam.emit(ServerStopping()),
    )


async def serve(settings: Settings, signals: Signals | None = None, tracing: Tracing | None = None) -> None:
    """Listen, then do what `serve_on` does."""
    with contextlib.closing(listener.listen(settings.host, settings.port)) as socket_:
        started = partial(_report_start, settings, "{}:{}".format(*socket_.getsockname()[:2]))
        await serve_on(socket_, settings, started, signals, tracing)


async def serve_on(
    socket_: socket.socket,
    settings: Settings,
    started: Callable[[], None],
    signals: Signals | None = None,
    tracing: Tracing | None = None,
    console: ConsoleConfig | None = None,
) -> None:
    """Check the database, take the transport lease, then serve until cancelled. Call `started` when it serves.

    Raises ConfigurationError, also while it serves: if Postgres is down at first, another transport is found later.
    """
    lease = bootstrap.transport_lease(settings)
    try:
        await db.check(settings.database_url.get_secret_value())
        await _take_lease(settings, lease)
    except DatabaseUnavailable as error:
        # Start anyway: /readyz reports it, requests get 503, and work resumes when Postgres is back.
        log.warning("serve.without_database", error=str(error))
    server = make_server(settings, socket_, signals, lease, tracing, console)

    def start() -> None:
        _calm_garbage_collector()
        started()

    await listener.run(server, started=start, unless=lease.until_refused())


async def _take_lease(settings: Settings, lease: TransportLease) -> None:
    """Take the lease if any of the roles needs it. Raises ConfigurationError, DatabaseUnavailable."""
    if settings.roles & LEASING_ROLES:
        await lease.take(settings.database_url.get_secret_value())


def _calm_garbage_collector() -> None:
    """Leave what the start made out of every collection, and collect less often.

    A request frees nearly all that it makes by reference counts, and each collection stopped all requests to walk
    through the same modules, models and pools again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 10)


def _report_start(settings: Settings, address: str) -> None:
    log.info("serve.started", address=address, roles=sorted(settings.roles))
    if settings.roles & LEASING_ROLES and bootstrap.transport_lease(settings).transport == local.NAME:
        log.warning(
            "serve.in_process_transport", advice="events reach no broker; set ORDERS_RABBITMQ_URL if they should"
        )

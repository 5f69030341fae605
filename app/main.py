"""The composition root: settings in, a running application out. Everything that is made is made here, and closed."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import TypedDict

import structlog
from fastapi import FastAPI

from app import db
from app.api import docs, health, openapi, problems
from app.api.body import Bodies
from app.api.middleware import Edge
from app.api.ops import dlq, outbox, sagas
from app.api.orders import cancel, place, read
from app.api.orders.long_poll import Waiters
from app.api.server import http_protocol
from app.api.server import listener as server_listener
from app.auth import jwks
from app.auth import rate_limit as auth_rate_limit
from app.auth.guards import Security
from app.auth.tokens import Keys, SharedSecret, Tokens
from app.bootstrap.workers import LEASING_ROLES, Checkpoint, Parts, Role, dead_letters_of, nothing, transport_lease
from app.cache import Cache
from app.errors import DatabaseUnavailable
from app.idempotency.concurrency_limit import Admission
from app.idempotency.single_flight import Idempotency
from app.loops import Loop
from app.messaging import backpressure, outbox_admin
from app.messaging.transport_lease import IN_PROCESS, TransportLease
from app.observability.metrics import Metrics
from app.orders.model import Status
from app.saga import maintenance
from app.settings import Settings

log = structlog.get_logger(__name__)

ADMIN_TOKEN_LENGTH = 16  # shorter ones are guessed
RELAY_POOL_SIZE = 4  # for the relay, the janitor, and counting
PROBE_POOL_SIZE = 2  # for readiness, and for the gauges: one look at a time each


class State(TypedDict):
    """What the routes find in `request.state`."""

    intake: place.Intake
    reading: read.Reading
    operators: outbox.Operators
    security: Security
    health: health.Health


def create_app(settings: Settings, checkpoint: Checkpoint = nothing, lease: TransportLease | None = None) -> FastAPI:
    """Make the application for the roles in `settings`; its lifespan starts and stops them.

    With a `lease`, it is the caller's to take it first and to end when it is refused.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        async with contextlib.AsyncExitStack() as stack:
            state = await _start(stack, settings, metrics, checkpoint, lease or transport_lease(settings))
            app.state.leave = state["reading"].waiters.leave  # `server.Server` calls it
            yield state

    app = FastAPI(
        title="Orders",
        version=openapi.VERSION,
        summary="Takes orders and drives each to an end: confirmed, or everything undone.",
        lifespan=lifespan,
        openapi_url="/openapi.json",
        docs_url=None,  # `pages` serves it, from files of our own and with a policy for its scripts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Edge, metrics=metrics, max_in_flight=settings.http_max_in_flight)
    problems.install(app)
    app.include_router(health.router)
    app.include_router(docs.router)
    if "api" in settings.roles:
        app.include_router(place.router)
        app.include_router(cancel.router)
        app.include_router(read.router)
        app.include_router(outbox.router)
        app.include_router(dlq.router)
        app.include_router(sagas.router)
    openapi.install(app)
    return app


def make_server(
    settings: Settings,
    listener: socket.socket,
    checkpoint: Checkpoint = nothing,
    lease: TransportLease | None = None,
) -> server_listener.Server:
    """Make the application and its server on `listener`, with the limits that hold below the application."""
    http = http_protocol.protocol(
        settings.http_header_timeout_seconds, settings.http_answer_timeout_seconds, settings.http_max_connections
    )
    app, keep_alive = create_app(settings, checkpoint, lease), settings.http_keep_alive_seconds
    return server_listener.Server(app, listener, settings.shutdown_timeout_seconds, http, keep_alive)


async def serve(settings: Settings, checkpoint: Checkpoint = nothing) -> None:
    """Check the database, take the transport lease, then serve until cancelled.

    Raises ConfigurationError, also while it serves: Postgres may be down first, and then show another transport in use.
    """
    lease = transport_lease(settings)
    listener = server_listener.listen(settings.host, settings.port)
    with contextlib.closing(listener):
        try:
            await db.check(settings.database_url.get_secret_value())
            await take_lease(settings, lease)
        except DatabaseUnavailable as error:
            # Not a reason to stay down: /readyz tells, requests get 503, and all goes on when it is back.
            log.warning("serve.without_database", error=str(error))
        one = make_server(settings, listener, checkpoint, lease)
        address = "{}:{}".format(*listener.getsockname()[:2])
        await server_listener.run(
            one, started=partial(_report_start, settings, lease, address), unless=lease.until_refused()
        )


async def take_lease(settings: Settings, lease: TransportLease) -> None:
    """Take the lease if any of the roles needs it. Raises ConfigurationError, DatabaseUnavailable."""
    if settings.roles & LEASING_ROLES:
        await lease.take(settings.database_url.get_secret_value())


def _report_start(settings: Settings, lease: TransportLease, address: str) -> None:
    log.info("serve.started", address=address, roles=sorted(settings.roles))
    if settings.roles & LEASING_ROLES and lease.transport == IN_PROCESS:
        log.warning(
            "serve.in_process_transport", advice="events reach no broker; set ORDERS_RABBITMQ_URL if they should"
        )


async def _start(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    metrics: Metrics,
    checkpoint: Checkpoint,
    lease: TransportLease,
) -> State:
    # A pool each: requests must not wait for background work, nor the other way round, and the relay must not wait
    # behind a crowd of messages and sagas: they are many at a time, it asks twice for a whole batch.
    url = settings.database_url.get_secret_value()
    impatient = settings.database_statement_seconds, settings.database_pool_wait_seconds
    request_pool = await stack.enter_async_context(db.open_pool(url, settings.database_pool_size, *impatient))
    work_pool = await stack.enter_async_context(db.open_pool(url, settings.database_pool_size))
    relay_pool = await stack.enter_async_context(db.open_pool(url, RELAY_POOL_SIZE))
    cache = _cache(stack, settings)
    limit = backpressure.Backlog(relay_pool, settings.outbox_max_pending)
    waiters = Waiters(request_pool)
    parts = Parts(settings, metrics, checkpoint, work_pool, relay_pool, lease, waiters.wake)
    roles = await parts.build(stack)
    if "api" in settings.roles:
        loop = Loop("backlog", limit.run_once, backpressure.PERIOD_SECONDS)
        roles += [Role("backlog", loop.run, loop.stop), Role("waiters", waiters.run, waiters.stop)]
    tasks = [asyncio.create_task(role.run(), name=role.name) for role in roles]
    stack.push_async_callback(_stop, roles, tasks, settings.shutdown_timeout_seconds / 2)
    # Half of the places for one source: room for many senders at once, and most connections are left to others.
    bodies = Bodies(settings.http_body_timeout_seconds, max(1, settings.http_max_in_flight // 2))
    intake = place.Intake(
        pool=request_pool,
        metrics=metrics,
        on_placed=parts.wake_relay,
        on_cancelled=parts.wake_all,
        checkpoint=checkpoint,
        idempotency=Idempotency(
            cache,
            Admission(settings.database_pool_size),
            metrics,
            required=settings.idempotency_required,
            ttl_seconds=settings.idempotency_ttl_seconds,
            wait_seconds=settings.idempotency_wait_seconds,
        ),
        backlog=limit,
        bodies=bodies,
    )
    probe_pool = await stack.enter_async_context(
        db.open_pool(url, PROBE_POOL_SIZE, health.COUNTING_SECONDS, health.CHECK_SECONDS)
    )
    pools = {"requests": request_pool, "work": work_pool, "relay": relay_pool, "probes": probe_pool}
    metrics.db_pool_in_use.set_function(lambda: sum(each.get_size() - each.get_idle_size() for each in pools.values()))
    probes = health.Health(*parts.checks(probe_pool, cache), metrics, partial(_count, probe_pool, metrics))
    stack.push_async_callback(probes.close)
    return {
        "intake": intake,
        "reading": read.Reading(request_pool, waiters),
        "operators": outbox.Operators(
            pool=request_pool,
            pools=pools,
            dead_letters=dead_letters_of(request_pool, settings.rabbitmq_url.get_secret_value()),
            on_pending=parts.wake_relay,
            on_saga=parts.wake_all,
            metrics=metrics,
            bodies=bodies,
        ),
        "security": await _security(stack, settings, cache),
        "health": probes,
    }


async def _security(stack: contextlib.AsyncExitStack, settings: Settings, cache: Cache | None) -> Security:
    tokens = rate_limit = None
    if settings.auth_mode == "jwt":
        keys: Keys = SharedSecret(settings.auth_jwt_secret.get_secret_value())
        if settings.auth_jwks_url:
            session = await stack.enter_async_context(jwks.open_session())
            keys = jwks.KeySet(session, settings.auth_jwks_url)
            if not settings.auth_audience:
                log.warning("auth.any_audience", advice="set ORDERS_AUTH_AUDIENCE unless the issuer serves nobody else")
        tokens = Tokens(keys, settings.auth_issuer, settings.auth_audience)
    if 0 < len(settings.admin_token.get_secret_value()) < ADMIN_TOKEN_LENGTH:
        log.warning(
            "auth.short_admin_token", advice=f"set ORDERS_ADMIN_TOKEN to {ADMIN_TOKEN_LENGTH} characters or more"
        )
    if settings.rate_limit:
        rate_limit = auth_rate_limit.RateLimit(settings.rate_limit, cache)
    return Security(tokens, settings.auth_tenant_claim, settings.admin_token.get_secret_value(), rate_limit)


def _cache(stack: contextlib.AsyncExitStack, settings: Settings) -> Cache | None:
    if not (url := settings.redis_url.get_secret_value()):
        return None
    cache = Cache(url, settings.redis_timeout_seconds)
    stack.push_async_callback(cache.close)
    return cache


async def _stop(roles: list[Role], tasks: list[asyncio.Task[None]], grace_seconds: float) -> None:
    """Let each role finish what it is at, cut what is not done in time: leases and redelivery take care of that."""
    for role in roles:
        role.stop()
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=grace_seconds)
        for task in late:
            log.warning("role.cut_short", role=task.get_name())
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _count(pool: db.Pool, metrics: Metrics) -> None:
    """Set the gauges of what waits in Postgres."""
    async with db.connection(pool) as conn:
        pending, age, parked = await outbox_admin.stats(conn)
        sagas = await maintenance.stats(conn)
    metrics.outbox_pending.set(pending)
    metrics.outbox_oldest_pending_age.set(age)
    metrics.outbox_parked.set(parked)
    for status in (Status.PENDING, Status.COMPENSATING):
        metrics.saga_in_flight.labels(status).set(sagas.in_flight.get(status, 0))
    metrics.saga_oldest_unfinished_age.set(sagas.oldest_age_seconds)
    metrics.saga_needs_operator.set(sagas.needs_operator)

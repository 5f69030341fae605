"""The composition root: settings in, a running application out. Everything that is made is made here, and closed."""

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict
from uuid import UUID

import structlog
from fastapi import FastAPI

from app import db, server
from app.api import cancelling, health, openapi, operators, orders, problems, reading
from app.api.admission import Admission
from app.api.edge import Edge
from app.api.idempotency import Idempotency
from app.api.security import Security
from app.api.waiting import Waiters
from app.cache import Cache
from app.errors import BrokerUnavailable, DatabaseUnavailable
from app.loops import Loop
from app.messaging import backlog, outbox
from app.messaging.consumer import Consumer
from app.messaging.local import LocalTransport
from app.messaging.rabbitmq import RabbitTransport, Subscription, close, connect
from app.messaging.relay import Relay, Transport
from app.operations.janitor import PERIOD_SECONDS, Janitor
from app.orders import events
from app.orders.status import Status
from app.partners.client import PartnerClient, open_session
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.shipping import HttpShipping
from app.saga import store
from app.saga.orchestrator import Orchestrator
from app.settings import Settings
from app.telemetry import Metrics, trace_headers

log = structlog.get_logger(__name__)

CONSUMER = "saga"  # the name in the inbox; it must never change
CONSUMED_TYPES = (events.PLACED,)
ROUTING_KEYS = ("order.placed",)
REQUEST_STATEMENT_SECONDS = 2.0  # a caller is better served by a 503 than by a longer wait

Checkpoint = Callable[[str], None]


def nothing(_: str) -> None:
    """Pass a checkpoint. Only tests put something else in its place, by argument: no setting can."""


class State(TypedDict):
    """What the routes find in `request.state`."""

    intake: orders.Intake
    reading: reading.Reading
    operators: operators.Operators
    security: Security
    health: health.Health


@dataclass(frozen=True, slots=True)
class Role:
    """A background loop: `run` returns after `stop`."""

    name: str
    run: Callable[[], Coroutine[Any, Any, None]]
    stop: Callable[[], None]


def create_app(settings: Settings, checkpoint: Checkpoint = nothing) -> FastAPI:
    """Make the application for the roles in `settings`; its lifespan starts and stops them."""
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        async with contextlib.AsyncExitStack() as stack:
            state = await _start(stack, settings, metrics, checkpoint)
            app.state.leave = state["reading"].waiters.leave  # `server.Server` calls it
            yield state

    app = FastAPI(
        title="Orders",
        version="0.1.0",
        summary="Takes orders and drives each to an end: confirmed, or everything undone.",
        lifespan=lifespan,
        openapi_url="/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Edge, metrics=metrics, max_in_flight=settings.http_max_in_flight)
    problems.install(app)
    app.include_router(health.router)
    if "api" in settings.roles:
        app.include_router(orders.router)
        app.include_router(cancelling.router)
        app.include_router(reading.router)
        app.include_router(operators.router)
    openapi.install(app)
    return app


async def serve(settings: Settings, checkpoint: Checkpoint = nothing) -> None:
    """Check the database, then serve until cancelled. Raises ConfigurationError."""
    listener = server.listen(settings.host, settings.port)
    with contextlib.closing(listener):
        try:
            await db.check(settings.database_url.get_secret_value())
        except DatabaseUnavailable as error:
            # Not a reason to stay down: /readyz tells, requests get 503, and all goes on when it is back.
            log.warning("serve.without_database", error=str(error))
        one = server.Server(create_app(settings, checkpoint), listener, settings.shutdown_timeout_seconds)
        address = "{}:{}".format(*listener.getsockname()[:2])
        await server.run(one, started=lambda: log.info("serve.started", address=address, roles=sorted(settings.roles)))


async def _start(
    stack: contextlib.AsyncExitStack, settings: Settings, metrics: Metrics, checkpoint: Checkpoint
) -> State:
    url = settings.database_url.get_secret_value()
    # Two pools: requests must not wait for background work, nor the other way round.
    request_pool = await _pool(stack, url, settings.database_pool_size, REQUEST_STATEMENT_SECONDS)
    work_pool = await _pool(stack, url, settings.database_pool_size, db.COMMAND_TIMEOUT_SECONDS)
    cache = _cache(stack, settings.redis_url.get_secret_value())
    limit = backlog.Backlog(work_pool, settings.outbox_max_pending)
    waiters = Waiters(request_pool)
    parts = _Parts(settings, metrics, checkpoint, work_pool, waiters.wake)
    roles = await parts.build(stack)
    if "api" in settings.roles:
        loop = Loop("backlog", limit.run_once, backlog.PERIOD_SECONDS)
        roles += [Role("backlog", loop.run, loop.stop), Role("waiters", waiters.run, waiters.stop)]
    tasks = [asyncio.create_task(role.run(), name=role.name) for role in roles]
    stack.push_async_callback(_stop, roles, tasks, settings.shutdown_timeout_seconds / 2)
    intake = orders.Intake(
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
        body_timeout_seconds=settings.http_body_timeout_seconds,
    )
    checks, decisive = parts.checks(request_pool, cache)
    refresh = partial(_refresh_gauges, work_pool, (request_pool, work_pool), metrics)
    return {
        "intake": intake,
        "reading": reading.Reading(request_pool, waiters),
        "operators": operators.Operators(request_pool, {"requests": request_pool, "work": work_pool}),
        "security": Security(admin_token=settings.admin_token.get_secret_value()),
        "health": health.Health(checks, decisive, metrics, refresh),
    }


async def _pool(stack: contextlib.AsyncExitStack, url: str, size: int, command_seconds: float) -> db.Pool:
    pool = await db.create_pool(url, size, command_seconds)
    # Terminate, not close: by then nobody uses it, and a server that does not answer must not hold the exit up.
    stack.callback(pool.terminate)
    return pool


def _cache(stack: contextlib.AsyncExitStack, url: str) -> Cache | None:
    if not url:
        return None
    cache = Cache(url)
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


class _Parts:
    """The background roles of one process and what connects them."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        checkpoint: Checkpoint,
        pool: db.Pool,
        on_finished: Callable[[UUID], None],
    ) -> None:
        self._settings = settings
        self._on_finished = on_finished
        self._metrics = metrics
        self._checkpoint = checkpoint
        self._pool = pool
        self._broker_url = settings.rabbitmq_url.get_secret_value()
        self._relay_loop: Loop | None = None
        self._wake_orchestrator: Callable[[], None] = _nobody
        self._subscription: Subscription | None = None

    def wake_relay(self) -> None:
        """There is something in the outbox. Without a relay in this process, another one's poll finds it."""
        if self._relay_loop is not None:
            self._relay_loop.wake()

    def wake_all(self) -> None:
        """An order was cancelled: it has ended, or its saga has to turn back."""
        self.wake_relay()
        self._wake_orchestrator()

    async def build(self, stack: contextlib.AsyncExitStack) -> list[Role]:
        """Make the loops of this process's roles, in the order of the way of an order."""
        roles: list[Role] = []
        consumer: Consumer | None = None
        if "consumer" in self._settings.roles:
            orchestrator = await self._orchestrator(stack)
            self._wake_orchestrator = orchestrator.wake
            consumer = self._consumer(orchestrator.wake)
            roles.append(Role("orchestrator", orchestrator.run, orchestrator.stop))
            if self._broker_url:
                prefetch = self._settings.consumer_prefetch
                self._subscription = Subscription(self._broker_url, consumer, ROUTING_KEYS, prefetch)
                roles.append(Role("consumer", self._subscription.run, self._subscription.stop))
        if "relay" in self._settings.roles:
            loop = self._relay_loop = self._relay(self._transport(stack, consumer))
            roles.append(Role("relay", loop.run, loop.stop))
        if "janitor" in self._settings.roles:
            loop = Loop("janitor", Janitor(self._pool).run_once, PERIOD_SECONDS)
            roles.append(Role("janitor", loop.run, loop.stop))
        return roles

    def _transport(self, stack: contextlib.AsyncExitStack, consumer: Consumer | None) -> Transport:
        if consumer is not None and not self._broker_url:
            return LocalTransport(consumer)
        timeout = self._settings.outbox_publish_timeout_seconds
        transport = RabbitTransport(self._broker_url, CONSUMED_TYPES, ROUTING_KEYS, timeout)
        stack.push_async_callback(transport.close)
        return transport

    def _relay(self, transport: Transport) -> Loop:
        settings = self._settings
        relay = Relay(
            self._pool,
            transport,
            self._metrics,
            batch_size=settings.outbox_batch_size,
            lease_seconds=settings.outbox_lease_seconds,
            backoff_base_seconds=settings.outbox_backoff_base_seconds,
            backoff_cap_seconds=settings.outbox_backoff_cap_seconds,
            max_attempts=settings.outbox_max_attempts,
            checkpoint=self._checkpoint,
        )
        return Loop("relay", relay.run_once, settings.outbox_poll_seconds)

    def _consumer(self, wake_orchestrator: Callable[[], None]) -> Consumer:
        start = partial(store.start, deadline_seconds=self._settings.saga_deadline_seconds)
        return Consumer(
            self._pool,
            CONSUMER,
            dict.fromkeys(CONSUMED_TYPES, start),
            self._metrics,
            max_attempts=self._settings.inbox_max_attempts,
            after_commit=wake_orchestrator,
            checkpoint=self._checkpoint,
        )

    async def _orchestrator(self, stack: contextlib.AsyncExitStack) -> Orchestrator:
        settings = self._settings
        session = await stack.enter_async_context(open_session())
        client = partial(
            PartnerClient,
            session,
            timeout_seconds=settings.partner_timeout_seconds,
            extra_headers=trace_headers,
        )
        return Orchestrator(
            self._pool,
            HttpInventory(client(settings.inventory_url), math.ceil(settings.hold_seconds)),
            HttpPayment(client(settings.payment_url)),
            HttpShipping(client(settings.shipping_url)),
            self._metrics,
            owner=f"{socket.gethostname()}:{os.getpid()}",
            concurrency=settings.saga_concurrency,
            poll_seconds=settings.saga_poll_seconds,
            lease_seconds=settings.saga_lease_seconds,
            retry_base_seconds=settings.partner_retry_base_seconds,
            retry_cap_seconds=settings.partner_retry_cap_seconds,
            on_event=self.wake_relay,
            checkpoint=self._checkpoint,
            on_finished=self._on_finished,
        )

    def checks(self, pool: db.Pool, cache: Cache | None) -> tuple[Mapping[str, health.Check], frozenset[str]]:
        """Return what readiness looks at, and what of it decides.

        A process that takes orders needs Postgres alone: the outbox outlasts the broker. The others need both.
        """
        checks: dict[str, Callable[[], Awaitable[str]]] = {"postgres": partial(_check_postgres, pool)}
        if self._broker_url and self._settings.roles & {"relay", "consumer"}:
            checks["rabbitmq"] = self._check_rabbitmq
        if cache is not None:
            checks["redis"] = partial(_check_redis, cache)
        decisive = {"postgres"} if "api" in self._settings.roles else {"postgres", "rabbitmq"}
        return checks, frozenset(decisive)

    async def _check_rabbitmq(self) -> str:
        if self._subscription is None:
            await close(await connect(self._broker_url, "orders readiness"))
        elif not self._subscription.connected:
            raise BrokerUnavailable("the consumer is not connected")
        return "reachable"


async def _check_redis(cache: Cache) -> str:
    await cache.check()
    return "reachable"


def _nobody() -> None:
    """Wake nobody: what there is to do is found by the poll of a process that does it."""


async def _check_postgres(pool: db.Pool) -> str:
    async with db.connection(pool) as conn:
        if db.is_behind(await db.revision(conn)):
            raise DatabaseUnavailable("the schema is behind this release")
    return "reachable, schema current"


async def _refresh_gauges(pool: db.Pool, pools: tuple[db.Pool, ...], metrics: Metrics) -> None:
    metrics.db_pool_in_use.set(sum(each.get_size() - each.get_idle_size() for each in pools))
    async with db.connection(pool) as conn:
        pending, age, parked = await outbox.stats(conn)
        unfinished, oldest = await store.stats(conn)
    metrics.outbox_pending.set(pending)
    metrics.outbox_oldest_pending_age.set(age)
    metrics.outbox_parked.set(parked)
    for status in (Status.PENDING, Status.COMPENSATING):
        metrics.saga_in_flight.labels(status).set(unfinished.get(status, 0))
    metrics.saga_oldest_unfinished_age.set(oldest)

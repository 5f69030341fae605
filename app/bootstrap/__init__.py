"""Build a process from its settings, in one pass: pools, cache, broker, background tasks, routes' dependencies."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

import structlog

from app import db
from app.api import health
from app.api.body import Bodies
from app.api.facts import ServerStopping
from app.api.health import SharedCall
from app.api.ops.deps import OpsDeps
from app.api.orders.deps import OrdersDeps
from app.api.orders.long_poll import Waiters
from app.api.orders.streams import Streams
from app.auth import jwks
from app.auth.guards import Security
from app.auth.rate_limit import RateLimit
from app.auth.tokens import Keys, SharedSecret, Tokens
from app.bootstrap import metrics, readiness
from app.bootstrap.brokers import dead_letters_by_queue, make_broker, transport_name
from app.bootstrap.consumers import CONSUMERS, ConsumerRow, queues
from app.bootstrap.readiness import Messaging, OutboxAge
from app.bootstrap.tracing import late_traces_task
from app.bootstrap.workers import LEASING_ROLES, BackgroundTask, make_pruner, process_name, start
from app.bootstrap.workers import build as build_workers
from app.cache import Cache
from app.console.deps import ConsoleConfig, ConsoleDeps
from app.console.sessions import Sessions
from app.idempotency import Idempotency, IdempotencyConfig
from app.idempotency.replay_memory import ReplayMemory
from app.messaging import backpressure
from app.messaging.backpressure import Backpressure
from app.messaging.transport_lease import TransportLease
from app.observability.facts import LoopsStarting
from app.observability.signals import Signals
from app.observability.tracing import Tracing
from app.operations import stats
from app.operations.maintenance import pruner
from app.operations.overview import Overview
from app.orders.facts import OrderFinished
from app.pages.feed import PERIOD_SECONDS, Feed
from app.settings import Retention, Settings

log = structlog.get_logger(__name__)

ADMIN_TOKEN_LENGTH = 16  # shorter ones can be guessed
RELAY_POOL_SIZE = 4  # for the relay, maintenance, and counting
PROBE_POOL_SIZE = 2  # for readiness and for the gauges, one query each


class RequestState(TypedDict):
    """What the routes find in `request.state`. `console` None: it is not served."""

    orders: OrdersDeps
    ops: OpsDeps
    security: Security
    health: health.Health
    console: ConsoleDeps | None


def transport_lease(settings: Settings) -> TransportLease:
    """Return the lease of the transport that the settings name, not yet taken."""
    return TransportLease(transport_name(settings.rabbitmq_url.get_secret_value()), process_name())


async def build(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    signals: Signals,
    lease: TransportLease,
    consumers: Sequence[ConsumerRow] = CONSUMERS,
    tracing: Tracing | None = None,
    console: ConsoleConfig | None = None,
) -> RequestState:
    """Build the process, start its background tasks, and leave their end on `stack`."""
    # Separate pools: requests must not wait for background work, nor background work for requests. The relay must not
    # queue behind many messages and sagas, because it asks only twice for a whole batch.
    url, specs = settings.database_url.get_secret_value(), queues(consumers)
    limits = settings.database_statement_seconds, settings.database_pool_wait_seconds
    request_pool = await stack.enter_async_context(db.open_pool(url, settings.database_pool_size, *limits))
    work_pool = await stack.enter_async_context(db.open_pool(url, settings.database_pool_size))
    relay_pool = await stack.enter_async_context(db.open_pool(url, RELAY_POOL_SIZE))
    probe_pool = await stack.enter_async_context(
        db.open_pool(url, PROBE_POOL_SIZE, health.COUNTING_SECONDS, health.CHECK_SECONDS)
    )
    db.join_pools(request_pool, work_pool, relay_pool, probe_pool)
    pools = {"requests": request_pool, "work": work_pool, "relay": relay_pool, "probes": probe_pool}
    registry = metrics.install(signals, specs)
    cache = _open_cache(stack, settings)
    patience = settings.outbox_publish_timeout_seconds
    broker = make_broker(settings.rabbitmq_url.get_secret_value(), relay_pool, signals, patience, specs)
    if settings.roles & LEASING_ROLES:
        stack.push_async_callback(lease.release, relay_pool)
    stack.push_async_callback(broker.close)  # before the lease is released

    workers = await build_workers(stack, settings, signals, lease, broker, work_pool, relay_pool, consumers)
    if tracing is not None and "consumer" in settings.roles:
        workers.tasks.append(late_traces_task(tracing, work_pool, specs[0], signals))
    backlog, waiters = Backpressure(relay_pool, settings.outbox_max_pending), Waiters(request_pool, signals)
    streams = Streams(request_pool, specs[0].consumer)
    stack.push_async_callback(streams.close)
    if "api" in settings.roles:
        workers.tasks.append(BackgroundTask.loop("backlog", backlog.run_once, backpressure.PERIOD_SECONDS, signals))
        workers.tasks.append(BackgroundTask("waiters", waiters.run, waiters.stop))
        signals.subscribe(OrderFinished, lambda fact: waiters.wake(fact.order_id))
        signals.subscribe(ServerStopping, lambda _: waiters.answer_all())
        signals.subscribe(OrderFinished, lambda fact: streams.wake(fact.order_id))
        signals.subscribe(ServerStopping, lambda _: streams.stop())

    circuit_state = None if workers.gateway is None else workers.gateway.circuit_state
    metrics.install_gauges(
        registry,
        circuit_state,
        lambda: sum(pool.get_size() - pool.get_idle_size() for pool in pools.values()),
        lambda: streams.count,
        None if workers.gateway is None else workers.gateway.pauses.is_paused,
    )
    is_leasing = bool(settings.roles & LEASING_ROLES)
    messaging = Messaging(broker, lease, workers.relay, workers.subscriptions)
    count = SharedCall(partial(stats.measure, probe_pool, signals), health.COUNTING_SHARE)
    outbox_age = OutboxAge(count, signals)
    checks = readiness.checks(
        probe_pool, cache, messaging if is_leasing else None, outbox_age, takes_orders="api" in settings.roles
    )
    probes = health.Health(*checks, registry, count)
    security = await _open_security(stack, settings, cache)
    # One source may use half of the slots: enough for many senders, and the rest stays free for other sources.
    bodies = Bodies(settings.http_body_timeout_seconds, max(1, settings.http_max_in_flight // 2))
    signals.emit(LoopsStarting(tuple(task.name for task in workers.tasks)))
    start(stack, workers.tasks, settings.shutdown_timeout_seconds / 2)
    stack.push_async_callback(probes.close)
    console_deps = None
    if console is not None:
        answers = partial(metrics.read_answers, registry)
        overview = Overview(
            request_pool, signals, specs[0].consumer, circuit_state, answers, has_broker=broker.is_shared
        )
        console_deps = _open_console(stack, console, security, signals, overview)
    return {
        "orders": OrdersDeps(
            pool=request_pool,
            idempotency=Idempotency(request_pool, cache, _idempotency_config(settings), signals),
            replay_memory=ReplayMemory(signals),
            key_required=settings.idempotency_required,
            admit=backlog.require_room,
            bodies=bodies,
            waiters=waiters,
            streams=streams,
            signals=signals,
        ),
        "ops": OpsDeps(
            pool=request_pool,
            pools=pools,
            dead_letters=dead_letters_by_queue(request_pool, broker, specs),
            circuit_state=circuit_state,
            signals=signals,
            bodies=bodies,
        ),
        "security": security,
        "health": probes,
        "console": console_deps,
    }


def _open_console(
    stack: contextlib.AsyncExitStack,
    config: ConsoleConfig,
    security: Security,
    signals: Signals,
    overview: Overview,
) -> ConsoleDeps:
    read_overview = SharedCall(overview.read, fresh_seconds=PERIOD_SECONDS / 2)
    stack.push_async_callback(read_overview.close)
    feed = Feed()
    stack.push_async_callback(feed.close)  # first: it calls the overview
    signals.subscribe(ServerStopping, lambda _: feed.stop())
    return ConsoleDeps(Sessions(security, config.open_key), feed, config.playground_url, read_overview)


async def prune(settings: Retention) -> tuple[dict[str, int], dict[str, Exception]]:
    """Sweep once. Returns how many rows were deleted, and what failed, by table. Raises DatabaseUnavailable."""
    url = settings.database_url.get_secret_value()
    await db.check(url)
    removed: dict[str, int] = dict.fromkeys(pruner.TABLES, 0)
    failures: dict[str, Exception] = {}
    async with db.open_pool(url, 1) as pool:
        async for table, rows, error in make_pruner(pool, settings, Signals()).sweep():
            removed[table] += rows
            if error is not None:
                failures[table] = error
    return removed, failures


def _idempotency_config(settings: Settings) -> IdempotencyConfig:
    return IdempotencyConfig(
        ttl_seconds=settings.idempotency_ttl_seconds,
        wait_seconds=settings.idempotency_wait_seconds,
        concurrency=settings.database_pool_size,
    )


def _open_cache(stack: contextlib.AsyncExitStack, settings: Settings) -> Cache | None:
    if not (url := settings.redis_url.get_secret_value()):
        return None
    cache = Cache(url, settings.redis_timeout_seconds)
    stack.push_async_callback(cache.close)
    return cache


async def _open_security(stack: contextlib.AsyncExitStack, settings: Settings, cache: Cache | None) -> Security:
    tokens = None
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
    rate_limit = RateLimit(settings.rate_limit, cache) if settings.rate_limit else None
    return Security(tokens, settings.auth_tenant_claim, settings.admin_token.get_secret_value(), rate_limit)

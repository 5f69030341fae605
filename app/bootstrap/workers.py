"""Build, start and stop the background tasks of a process, by its roles."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from app import db
from app.bootstrap.consumers import CONSUMERS, ConsumerRow, queues
from app.bootstrap.partners import open_gateway
from app.bootstrap.verification import find_books, make_config, make_verifier
from app.loops import Backoff, Loop
from app.messaging import queue_depth
from app.messaging.broker import Broker, Subscription
from app.messaging.consumer import Consumer
from app.messaging.facts import EventsPending, EventsResent, MessageHandled
from app.messaging.queue_depth import QueueDepth
from app.messaging.relay import Relay, RelayConfig
from app.messaging.spans import IN_PROCESS, RABBITMQ
from app.messaging.transport_lease import RENEW_PERIOD_SECONDS, LeasedTransport, TransportLease
from app.observability.facts import LoopSucceeded
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetters
from app.operations.maintenance import lost_letters, pruner, resender, verifying
from app.operations.maintenance.lost_letters import LostLetters
from app.operations.maintenance.pruner import Pruner, PrunerConfig
from app.operations.maintenance.resender import Resender
from app.operations.maintenance.verifying import RecentVerifier
from app.operations.verify.run import Verifier
from app.orders.facts import CancelAccepted, OrderFinished, OrderPlaced
from app.partners.circuit import CircuitState
from app.partners.http import HttpClient
from app.saga.facts import PartnerPauseChanged, SagaDue
from app.saga.gateway import PartnerGateway
from app.saga.orchestrator import Orchestrator
from app.saga.pause_watch import PERIOD_SECONDS, PauseWatch
from app.saga.pauses import PartnerPauses
from app.saga.runner import SagaConfig
from app.settings import Retention, Settings
from app.values import immutable

log = structlog.get_logger(__name__)

LEASING_ROLES = frozenset({"relay", "consumer"})  # the roles that use the transport, for which they need a lease


@immutable
class BackgroundTask:
    """A background task: `run` returns after `stop`."""

    name: str
    run: Callable[[], Coroutine[Any, Any, None]]
    stop: Callable[[], None]

    @classmethod
    def loop(
        cls, name: str, run_once: Callable[[], Awaitable[int]], period_seconds: float, signals: Signals
    ) -> "BackgroundTask":
        """Return a task that calls `run_once` repeatedly."""
        loop = make_loop(name, run_once, period_seconds, signals)
        return cls(name, loop.run, loop.stop)


def make_loop(name: str, run_once: Callable[[], Awaitable[int]], period_seconds: float, signals: Signals) -> Loop:
    """Return a loop that reports each success."""
    return Loop(name, run_once, period_seconds, lambda: signals.emit(LoopSucceeded(name)))


@dataclass(slots=True)
class Workers:
    """The background tasks of one process. `relay`, `gateway` None: the process does not have the role."""

    tasks: list[BackgroundTask] = field(default_factory=list)
    relay: Relay | None = None
    gateway: PartnerGateway | None = None
    subscriptions: list[Subscription] = field(default_factory=list)


async def build(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    signals: Signals,
    lease: TransportLease,
    broker: Broker,
    work_pool: db.Pool,
    relay_pool: db.Pool,
    consumers: Sequence[ConsumerRow],
) -> Workers:
    """Build the workers of the process's roles. `start` starts them."""
    workers = Workers()
    if settings.roles & LEASING_ROLES:
        renew = partial(lease.renew, relay_pool)
        workers.tasks.append(BackgroundTask.loop("transport", renew, RENEW_PERIOD_SECONDS, signals))
    if "consumer" in settings.roles:
        pauses = PartnerPauses()
        watch = make_loop("pauses", PauseWatch(relay_pool, pauses, signals).run_once, PERIOD_SECONDS, signals)
        workers.tasks.append(BackgroundTask("pauses", watch.run, watch.stop))
        signals.wake(watch.wake, PartnerPauseChanged)
        workers.gateway = await open_gateway(stack, settings, signals, pauses)
        orchestrator = Orchestrator(work_pool, workers.gateway, _saga_config(settings), signals)
        workers.tasks.append(BackgroundTask("orchestrator", orchestrator.run, orchestrator.stop))
        signals.wake(orchestrator.wake, MessageHandled, CancelAccepted, SagaDue)
        for row in consumers:
            _subscribe(workers, row, settings, signals, lease, broker, work_pool)
    if "relay" in settings.roles:
        transport = LeasedTransport(broker.transport, lease)
        workers.relay = Relay(relay_pool, transport, _relay_config(settings, _messaging_system(broker)), signals)
        loop = make_loop("relay", workers.relay.run_batch, settings.outbox_poll_seconds, signals)
        workers.tasks.append(BackgroundTask("relay", loop.run, loop.stop))
        signals.wake(loop.wake, OrderPlaced, CancelAccepted, OrderFinished, EventsPending, EventsResent, SagaDue)
    if settings.roles & LEASING_ROLES:
        depth = QueueDepth(broker, queues(consumers), signals)
        workers.tasks.append(BackgroundTask.loop("depths", depth.run_once, queue_depth.PERIOD_SECONDS, signals))
    if "janitor" in settings.roles:
        workers.tasks += _maintenance(settings, signals, broker, relay_pool, consumers)
        workers.tasks.append(await _verification(stack, settings, signals, broker, relay_pool, workers.gateway))
    return workers


def _subscribe(
    workers: Workers,
    row: ConsumerRow,
    settings: Settings,
    signals: Signals,
    lease: TransportLease,
    broker: Broker,
    pool: db.Pool,
) -> None:
    handlers = dict.fromkeys(row.queue.event_types, row.handler(settings))
    consumer = Consumer(
        pool, row.queue.consumer, handlers, settings.inbox_max_attempts, signals, _messaging_system(broker)
    )
    subscription = broker.subscribe(row.queue, consumer, settings.consumer_prefetch, lease.require)
    if subscription is not None:
        workers.subscriptions.append(subscription)
        workers.tasks.append(BackgroundTask("consumer", subscription.run, subscription.stop))


def _maintenance(
    settings: Settings, signals: Signals, broker: Broker, pool: db.Pool, consumers: Sequence[ConsumerRow]
) -> list[BackgroundTask]:
    queue = consumers[0].queue  # the saga's: resending is about sagas that did not start
    resends = Resender(pool, queue.consumer, partial(broker.read_depth, queue), signals)
    prunes = make_pruner(pool, settings, signals, consumers)
    tasks = [
        BackgroundTask.loop("resender", resends.run_once, resender.PERIOD_SECONDS, signals),
        BackgroundTask.loop("janitor", prunes.run_once, pruner.PERIOD_SECONDS, signals),
    ]
    # Other processes may use a broker that this one does not know; its dead letters would look lost from here.
    if broker.is_shared or settings.roles & LEASING_ROLES:
        lost = LostLetters(DeadLetters(pool, queue, broker.dead_letters(queue, pool)), signals)
        tasks.append(BackgroundTask.loop("lost-letters", lost.run_once, lost_letters.POLL_SECONDS, signals))
    return tasks


async def _verification(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    signals: Signals,
    broker: Broker,
    pool: db.Pool,
    gateway: PartnerGateway | None,
) -> BackgroundTask:
    """Return the task that verifies recent orders. Without the URL of a partner, it leaves out what needs it."""
    http = await stack.enter_async_context(HttpClient())

    def is_circuit_open(partner: str) -> bool:
        return gateway is not None and gateway.circuit_state(partner) is CircuitState.OPEN

    async def make() -> Verifier:
        access = await find_books(http, settings, is_circuit_open)
        return make_verifier(pool, broker, queues(), access, make_config(settings))

    recent = RecentVerifier(make, signals)
    return BackgroundTask.loop("verify", recent.run_once, verifying.PERIOD_SECONDS, signals)


def start(stack: contextlib.AsyncExitStack, tasks: Sequence[BackgroundTask], grace_seconds: float) -> None:
    """Start the tasks; `stack` stops them."""
    running = [asyncio.create_task(task.run(), name=task.name) for task in tasks]
    stack.push_async_callback(_stop, tasks, running, grace_seconds)


async def _stop(tasks: Sequence[BackgroundTask], running: list[asyncio.Task[None]], grace_seconds: float) -> None:
    """Let each task finish its current work, then cancel late tasks: leases and redelivery recover their work."""
    for task in tasks:
        task.stop()
    if running:
        _, late = await asyncio.wait(running, timeout=grace_seconds)
        for late_task in late:
            log.warning("role.cut_short", role=late_task.get_name())
            late_task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def make_pruner(
    pool: db.Pool, settings: Retention, signals: Signals, consumers: Sequence[ConsumerRow] = CONSUMERS
) -> Pruner:
    """Return what deletes rows past their retention."""
    config = PrunerConfig(
        consumers=[queue.consumer for queue in queues(consumers)],
        outbox_retention_seconds=settings.outbox_retention_seconds,
        inbox_retention_seconds=settings.inbox_retention_seconds,
        saga_retention_seconds=settings.saga_retention_seconds,
    )
    return Pruner(pool, config, signals)


def process_name() -> str:
    """Return the name of this process in leases."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _saga_config(settings: Settings) -> SagaConfig:
    return SagaConfig(
        owner=process_name(),
        concurrency=settings.saga_concurrency,
        poll_seconds=settings.saga_poll_seconds,
        lease_seconds=settings.saga_lease_seconds,
        retry=Backoff(settings.partner_retry_base_seconds, settings.partner_retry_cap_seconds),
        needs_operator_seconds=settings.saga_needs_operator_seconds,
    )


def _messaging_system(broker: Broker) -> str:
    return RABBITMQ if broker.is_shared else IN_PROCESS


def _relay_config(settings: Settings, messaging_system: str) -> RelayConfig:
    return RelayConfig(
        batch_size=settings.outbox_batch_size,
        lease_seconds=settings.outbox_lease_seconds,
        backoff=Backoff(settings.outbox_backoff_base_seconds, settings.outbox_backoff_cap_seconds),
        max_attempts=settings.outbox_max_attempts,
        messaging_system=messaging_system,
    )

"""The background roles of one process, and what connects them: the composition root's half behind the HTTP face."""

import contextlib
import math
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from app import db
from app.api import health
from app.cache import Cache
from app.errors import BrokerUnavailable, DatabaseUnavailable
from app.loops import Loop
from app.messaging import queue_depth
from app.messaging.consumer import Consumer
from app.messaging.local import LocalTransport
from app.messaging.queue_depth import Depths
from app.messaging.rabbitmq.subscription import Subscription
from app.messaging.rabbitmq.transport import RabbitTransport
from app.messaging.relay import Relay, Transport
from app.messaging.transport_lease import (
    IN_PROCESS,
    RABBITMQ,
    RENEW_PERIOD_SECONDS,
    LeasedTransport,
    TransportLease,
)
from app.observability.metrics import PRUNED_TABLES, Metrics
from app.observability.traces import trace_headers
from app.operations.dead_letters import DeadLetters, InQueue
from app.operations.maintenance import lost_letters
from app.operations.maintenance.lost_letters import LostLetters
from app.operations.maintenance.pruner import RESEND_PERIOD_SECONDS, SWEEP_PERIOD_SECONDS, Janitor, Resender
from app.operations.parked_letters import ParkedRows
from app.orders import events
from app.partners.client import PartnerClient, open_session
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.ports import Payment
from app.partners.shipping import HttpShipping
from app.partners.stripe_payment import API_URL, StripePayment
from app.saga import store
from app.saga.gateway import Calls
from app.saga.orchestrator import Orchestrator
from app.settings import Retention, Settings

CONSUMER = "saga"  # the name in the inbox; it must never change
CONSUMED_TYPES = (events.PLACED,)
ROUTING_KEYS = ("order.placed",)
LEASING_ROLES = frozenset({"relay", "consumer"})  # they need the transport, and all must have the same

Checkpoint = Callable[[str], None]


def nothing(_: str) -> None:
    """Pass a checkpoint. Only tests put something else in its place, by argument: no setting can."""


@dataclass(frozen=True, slots=True)
class Role:
    """A background loop: `run` returns after `stop`."""

    name: str
    run: Callable[[], Coroutine[Any, Any, None]]
    stop: Callable[[], None]


def transport_lease(settings: Settings) -> TransportLease:
    """Return the lease of the transport that these settings name, not yet taken."""
    name = RABBITMQ if settings.rabbitmq_url.get_secret_value() else IN_PROCESS
    return TransportLease(name, _process_name())


def _process_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def dead_letters_of(pool: db.Pool, broker_url: str, checkpoint: Checkpoint = nothing) -> DeadLetters:
    """Return the saga's dead letters, where the transport leaves them. `broker_url` empty: in-process transport."""
    place = (
        InQueue(pool, CONSUMER, broker_url, ROUTING_KEYS, checkpoint)
        if broker_url
        else ParkedRows(pool, CONSUMER, CONSUMED_TYPES)
    )
    return DeadLetters(pool, CONSUMER, place)


class Parts:
    """The background roles of one process and what connects them."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        checkpoint: Checkpoint,
        pool: db.Pool,
        relay_pool: db.Pool,
        lease: TransportLease,
        on_finished: Callable[[UUID], None],
    ) -> None:
        self._settings = settings
        self._on_finished = on_finished
        self._metrics = metrics
        self._checkpoint = checkpoint
        self._pool = pool
        self._relay_pool = relay_pool
        self._lease = lease
        self._broker_url = settings.rabbitmq_url.get_secret_value()
        self._relay: Relay | None = None
        self._relay_loop: Loop | None = None
        self._wake_orchestrator: Callable[[], None] = _nobody
        self._subscription: Subscription | None = None
        self._rabbit_transport: RabbitTransport | None = None

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
        if self._settings.roles & LEASING_ROLES:
            roles.append(_looping("transport", partial(self._lease.renew, self._relay_pool), RENEW_PERIOD_SECONDS))
            stack.push_async_callback(self._lease.release, self._relay_pool)
        consumer: Consumer | None = None
        if "consumer" in self._settings.roles:
            orchestrator = await self._orchestrator(stack)
            self._wake_orchestrator = orchestrator.wake
            consumer = self._consumer(orchestrator.wake)
            roles.append(Role("orchestrator", orchestrator.run, orchestrator.stop))
            if self._broker_url:
                prefetch = self._settings.consumer_prefetch
                self._subscription = Subscription(
                    self._broker_url, consumer, ROUTING_KEYS, prefetch, require=self._lease.require
                )
                roles.append(Role("consumer", self._subscription.run, self._subscription.stop))
        if "relay" in self._settings.roles:
            transport = LeasedTransport(self._transport(stack, consumer), self._lease)
            relay = self._relay = self._make_relay(transport)
            loop = self._relay_loop = Loop("relay", relay.run_once, self._settings.outbox_poll_seconds)
            roles.append(Role("relay", loop.run, loop.stop))
        read_depths = self._depths(stack)
        if self._settings.roles & LEASING_ROLES:
            roles.append(_looping("depths", Depths(read_depths, self._metrics).run_once, queue_depth.PERIOD_SECONDS))
        if "janitor" in self._settings.roles:
            resender = Resender(self._relay_pool, self._metrics, CONSUMER, read_depths, self.wake_relay)
            roles.append(_looping("resender", resender.run_once, RESEND_PERIOD_SECONDS))
            # Without either, other processes may have a broker, and what waits in its queue would look lost from here.
            if self._broker_url or self._settings.roles & LEASING_ROLES:
                letters = dead_letters_of(self._relay_pool, self._broker_url)
                lost = LostLetters(self._metrics, letters, self.wake_relay)
                roles.append(_looping("lost-letters", lost.run_once, lost_letters.POLL_SECONDS))
            janitor = make_janitor(self._relay_pool, self._metrics, self._settings)
            roles.append(_looping("janitor", janitor.run_once, SWEEP_PERIOD_SECONDS))
        return roles

    def _depths(self, stack: contextlib.AsyncExitStack) -> queue_depth.Read:
        if not self._broker_url:
            return partial(queue_depth.read_local, self._relay_pool, CONSUMED_TYPES)
        broker = queue_depth.BrokerDepths(self._broker_url)
        stack.push_async_callback(broker.close)
        return broker.read

    def _transport(self, stack: contextlib.AsyncExitStack, consumer: Consumer | None) -> Transport:
        if consumer is not None and not self._broker_url:
            return LocalTransport(consumer)
        patience = self._settings.outbox_publish_timeout_seconds
        transport = self._rabbit_transport = RabbitTransport(self._broker_url, CONSUMED_TYPES, ROUTING_KEYS, patience)
        stack.push_async_callback(transport.close)
        return transport

    def _make_relay(self, transport: Transport) -> Relay:
        settings = self._settings
        return Relay(
            self._relay_pool,
            transport,
            self._metrics,
            batch_size=settings.outbox_batch_size,
            lease_seconds=settings.outbox_lease_seconds,
            backoff_base_seconds=settings.outbox_backoff_base_seconds,
            backoff_cap_seconds=settings.outbox_backoff_cap_seconds,
            max_attempts=settings.outbox_max_attempts,
            checkpoint=self._checkpoint,
        )

    def _consumer(self, wake_orchestrator: Callable[[], None]) -> Consumer:
        hold, deadline = self._settings.inventory_hold_seconds, self._settings.saga_deadline_seconds
        start = partial(store.start, deadline_seconds=deadline, hold_seconds=None if hold is None else math.ceil(hold))
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
        calls = Calls(
            HttpInventory(client(settings.inventory_url)),
            self._payment(client),
            HttpShipping(client(settings.shipping_url)),
            self._metrics,
            circuit_failures=settings.partner_circuit_failures,
            circuit_open_seconds=settings.partner_circuit_open_seconds,
        )
        return Orchestrator(
            self._pool,
            calls,
            self._metrics,
            owner=_process_name(),
            concurrency=settings.saga_concurrency,
            poll_seconds=settings.saga_poll_seconds,
            lease_seconds=settings.saga_lease_seconds,
            retry_base_seconds=settings.partner_retry_base_seconds,
            retry_cap_seconds=settings.partner_retry_cap_seconds,
            needs_operator_seconds=settings.saga_needs_operator_seconds,
            on_event=self.wake_relay,
            checkpoint=self._checkpoint,
            on_finished=self._on_finished,
        )

    def _payment(self, client: Callable[..., PartnerClient]) -> Payment:
        settings = self._settings
        if settings.payment_provider == "http":
            return HttpPayment(client(settings.payment_url))
        # Stripe is not part of our traces: it gets none of their headers.
        stripe = client(settings.payment_url or API_URL, extra_headers=dict)
        return StripePayment(stripe, settings.stripe_api_key.get_secret_value(), settings.partner_timeout_seconds)

    def checks(self, pool: db.Pool, cache: Cache | None) -> tuple[Mapping[str, health.Check], frozenset[str]]:
        """Return what readiness looks at, and what of it decides.

        A process that takes orders needs Postgres alone: the outbox outlasts the broker. The others need both.
        """
        checks: dict[str, Callable[[], Awaitable[str]]] = {"postgres": partial(_check_postgres, pool)}
        if self._settings.roles & LEASING_ROLES:
            checks["transport"] = self._check_transport
            if self._broker_url:
                checks["rabbitmq"] = self._check_rabbitmq
        if cache is not None:
            checks["redis"] = partial(_check_redis, cache)
        decisive = {"postgres"} if "api" in self._settings.roles else {"postgres", "transport", "rabbitmq"}
        return checks, frozenset(decisive)

    async def _check_transport(self) -> str:
        self._lease.require()
        return self._lease.transport

    async def _check_rabbitmq(self) -> str:
        """Say whether relay and consumer can do their work; the relay opens its connection before there is any."""
        if self._relay is not None:
            self._relay.check()
        if self._rabbit_transport is not None and not self._rabbit_transport.connected:
            raise BrokerUnavailable("the relay is not connected", "the relay is not connected")
        if self._subscription is not None:
            self._subscription.check()
        return "reachable"


def _looping(name: str, run_once: Callable[[], Awaitable[int]], period_seconds: float) -> Role:
    loop = Loop(name, run_once, period_seconds)
    return Role(name, loop.run, loop.stop)


def make_janitor(pool: db.Pool, metrics: Metrics, settings: Retention) -> Janitor:
    """Make what removes rows past their retention."""
    return Janitor(
        pool,
        metrics,
        CONSUMER,
        outbox_retention_seconds=settings.outbox_retention_seconds,
        inbox_retention_seconds=settings.inbox_retention_seconds,
        saga_retention_seconds=settings.saga_retention_seconds,
    )


async def prune(settings: Retention) -> tuple[dict[str, int], dict[str, Exception]]:
    """Make one pass of the janitor. Returns how many rows it removed, and what failed, by table.

    Raises DatabaseUnavailable.
    """
    url = settings.database_url.get_secret_value()
    await db.check(url)
    removed, failures = dict.fromkeys(PRUNED_TABLES, 0), {}
    async with db.open_pool(url, 1) as pool:
        async for table, rows, error in make_janitor(pool, Metrics(), settings).sweep():
            removed[table] += rows
            if error is not None:
                failures[table] = error
    return removed, failures


async def _check_redis(cache: Cache) -> str:
    await cache.check()
    return "reachable"


def _nobody() -> None:
    """Wake nobody: what there is to do is found by the poll of a process that does it."""


async def _check_postgres(pool: db.Pool) -> str:
    async with db.connection(pool) as conn:
        await db.require_writable(conn)
        if db.is_behind(await db.revision(conn)):
            raise DatabaseUnavailable("the schema is behind this release")
    return "reachable, schema current"

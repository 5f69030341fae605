"""The readiness checks, and which of them decide."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial

from app import db
from app.api.health import Check
from app.cache import Cache
from app.errors import DatabaseUnavailable, Unavailable
from app.messaging.broker import Broker, Subscription
from app.messaging.facts import OutboxMeasured
from app.messaging.relay import Relay
from app.messaging.transport_lease import TransportLease
from app.observability.signals import Signals
from app.values import immutable

OLDEST_EVENT_SECONDS = 300.0
COUNT_PATIENCE_SECONDS = 1.0  # less than a check may take


@immutable
class Messaging:
    """The parts of a process that publish and consume. `relay` None: the process does not have the role."""

    broker: Broker
    lease: TransportLease
    relay: Relay | None
    subscriptions: Collection[Subscription]

    async def check_transport(self) -> str:
        """Check that this process holds its transport lease."""
        self.lease.require()
        return self.lease.transport

    async def check_broker(self) -> str:
        """Check that relay and consumers can work. The relay connects even when it has nothing to publish."""
        if self.relay is not None:
            self.relay.check()
            self.broker.check()
        for subscription in self.subscriptions:
            subscription.check()
        return "reachable"


class OutboxAge:
    """Checks how long the oldest event has waited, as of the last count. `count`: counts for all callers together."""

    def __init__(self, count: Callable[[], Awaitable[None]], signals: Signals) -> None:
        self._count = count
        self._oldest_seconds = 0.0
        signals.subscribe(OutboxMeasured, self._keep)

    def _keep(self, fact: OutboxMeasured) -> None:
        self._oldest_seconds = fact.oldest_pending_age_seconds

    async def check(self) -> str:
        """Raise Unavailable if an event has waited too long. While a count is slow, use the last one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COUNT_PATIENCE_SECONDS):
                await self._count()
        if self._oldest_seconds > OLDEST_EVENT_SECONDS:
            text = f"an event has waited for {self._oldest_seconds:.0f} s"
            raise Unavailable(text, text)
        return f"no event has waited for more than {OLDEST_EVENT_SECONDS:.0f} s"


def checks(
    pool: db.Pool, cache: Cache | None, messaging: Messaging | None, outbox_age: OutboxAge, *, takes_orders: bool
) -> tuple[Mapping[str, Check], frozenset[str]]:
    """Return the checks by name, and the names of those that decide. `messaging` None: neither relay nor consumer.

    A process that takes orders needs only Postgres, because the outbox keeps events while the broker is down. Other
    processes need both. In a process that publishes and takes no orders, an old event decides too.
    """
    found: dict[str, Callable[[], Awaitable[str]]] = {"postgres": partial(_check_postgres, pool)}
    if messaging is not None:
        found["transport"] = messaging.check_transport
        if messaging.broker.is_shared:
            found[messaging.broker.name] = messaging.check_broker
    decisive = frozenset(found) if not takes_orders else frozenset({"postgres"})
    found["outbox"] = outbox_age.check
    if messaging is not None and messaging.relay is not None and not takes_orders:
        decisive |= {"outbox"}
    if cache is not None:
        found["redis"] = partial(_check_redis, cache)
    return found, decisive


async def _check_postgres(pool: db.Pool) -> str:
    async with db.connection(pool) as conn:
        if db.is_behind(await db.writable_revision(conn)):
            raise DatabaseUnavailable("the schema is behind this release")
    return "reachable, schema current"


async def _check_redis(cache: Cache) -> str:
    await cache.check()
    return "reachable"

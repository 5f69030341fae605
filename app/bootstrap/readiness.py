"""The readiness checks, and which of them decide."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from app import db
from app.api.health import Check
from app.cache import Cache
from app.errors import DatabaseUnavailable
from app.messaging.broker import Broker, Subscription
from app.messaging.relay import Relay
from app.messaging.transport_lease import TransportLease


@dataclass(frozen=True, slots=True)
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


def checks(
    pool: db.Pool, cache: Cache | None, messaging: Messaging | None, *, takes_orders: bool
) -> tuple[Mapping[str, Check], frozenset[str]]:
    """Return the checks by name, and the names of those that decide. `messaging` None: neither relay nor consumer.

    A process that takes orders needs only Postgres, because the outbox keeps events while the broker is down. Other
    processes need both.
    """
    found: dict[str, Callable[[], Awaitable[str]]] = {"postgres": partial(_check_postgres, pool)}
    if messaging is not None:
        found["transport"] = messaging.check_transport
        if messaging.broker.is_shared:
            found[messaging.broker.name] = messaging.check_broker
    decisive = frozenset(found) if not takes_orders else frozenset({"postgres"})
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

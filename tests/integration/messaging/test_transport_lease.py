"""One database, one transport: of two different ones, one is refused; nothing is published without a lease."""

import asyncio
from pathlib import Path

import pytest

from app import db
from app.errors import ConfigurationError, TransportNotLeased
from app.messaging.local import NAME as IN_PROCESS
from app.messaging.rabbitmq.broker import NAME as RABBITMQ
from app.messaging.relay import UNCONFIRMED, Relay
from app.messaging.transport_lease import LeasedTransport, TransportLease
from tests.harness import servers
from tests.harness.events import CONFIRMED, Effects, event, put
from tests.harness.relays import local_transport, make_relay
from tests.harness.wait import AMPLE_SECONDS, wait_until

HOUR_SECONDS = 3600.0


def lease(transport: str, seconds: float = HOUR_SECONDS) -> TransportLease:
    return TransportLease(transport, f"the process with {transport}", seconds)


def relay_over(pool: db.Pool, transport: LeasedTransport) -> Relay:
    return make_relay(pool, transport, batch_size=10, lease_seconds=HOUR_SECONDS)


async def test_one_of_two_concurrent_transports_is_refused(pool: db.Pool) -> None:
    """Of two different transports that start at once, one is refused."""

    async def both_wait() -> bool:
        query = (
            "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return bool(await pool.fetchval(query))

    leases = [lease(RABBITMQ), lease(IN_PROCESS)]
    async with pool.acquire() as holder, holder.transaction():
        await holder.execute("LOCK TABLE transport_leases IN ACCESS EXCLUSIVE MODE")
        taking = [asyncio.create_task(holder.renew(pool)) for holder in leases]
        await wait_until(both_wait, AMPLE_SECONDS, "two that want a lease")
    results = await asyncio.gather(*taking, return_exceptions=True)
    assert {type(result) for result in results} == {int, ConfigurationError}
    assert len({holder.seconds_left() > 0 for holder in leases}) == 2
    assert await pool.fetchval("SELECT count(*) FROM transport_leases") == 1


async def test_a_refusal_names_the_setting_and_the_other_process(pool: db.Pool) -> None:
    """The error names the setting and the process that holds the lease."""
    await lease(RABBITMQ).renew(pool)
    refused = lease(IN_PROCESS)
    with pytest.raises(ConfigurationError, match=r"ORDERS_RABBITMQ_URL: .*the process with rabbitmq") as caught:
        await refused.renew(pool)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        await refused.until_refused()


async def test_a_refused_process_does_not_take_over_later(pool: db.Pool) -> None:
    """A refused process stays refused when the others stop."""
    first, refused = lease(RABBITMQ), lease(IN_PROCESS)
    await first.renew(pool)
    with pytest.raises(ConfigurationError):
        await refused.renew(pool)
    await first.release(pool)
    with pytest.raises(ConfigurationError):
        await refused.renew(pool)
    await lease(IN_PROCESS).renew(pool)


async def test_a_lease_expires_unless_renewed(pool: db.Pool) -> None:
    """Once a lease has expired, another transport can take it, and the first is refused."""

    async def is_over() -> bool:
        return bool(await pool.fetchval("SELECT bool_and(expires_at <= clock_timestamp()) FROM transport_leases"))

    short, other = lease(RABBITMQ, seconds=0.001), lease(IN_PROCESS)
    await short.renew(pool)
    await wait_until(is_over, AMPLE_SECONDS, "end of the lease")
    assert short.seconds_left() <= 0  # our clock ends the lease no later than Postgres
    await other.renew(pool)
    await other.renew(pool)
    with pytest.raises(ConfigurationError):
        await short.renew(pool)
    assert await pool.fetchval("SELECT count(*) FROM transport_leases") == 1


async def test_nothing_is_published_without_a_lease(pool: db.Pool, effects: Effects) -> None:
    """A process that froze past its lease notices by its own clock, without asking Postgres."""
    await put(pool, event(), event(event_type=CONFIRMED))
    held = lease(IN_PROCESS, seconds=0.001)
    transport = LeasedTransport(local_transport(effects.consumer()), held)
    with pytest.raises(TransportNotLeased):
        await relay_over(pool, transport).run_once()
    await held.renew(pool)
    await wait_until(lambda: held.seconds_left() <= 0, AMPLE_SECONDS, "end of the lease")
    with pytest.raises(TransportNotLeased):
        await transport.publish([event()], HOUR_SECONDS, [UNCONFIRMED])
    with pytest.raises(TransportNotLeased):
        await relay_over(pool, transport).run_once()
    assert await effects.committed() == []
    assert await pool.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NULL AND claim_token IS NULL") == 2
    again = LeasedTransport(local_transport(effects.consumer()), held_for_long := lease(IN_PROCESS))
    await held_for_long.renew(pool)
    assert await relay_over(pool, again).run_once() == 2


async def test_a_frozen_postgres_does_not_delay_the_release(server_directory: Path) -> None:
    """Releasing the lease does not wait for a frozen Postgres."""
    async with servers.postgres(server_directory) as postgres:
        await asyncio.to_thread(db.migrate, postgres.url)
        async with db.open_pool(postgres.url, 1) as pool:
            held = lease(RABBITMQ)
            await held.renew(pool)
            postgres.freeze()
            await held.release(pool)
            postgres.thaw()
        assert held.seconds_left() <= 0

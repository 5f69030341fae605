"""Bring an order into the state in which a command or the janitor finds it."""

from aio_pika.abc import AbstractChannel

from chaos.sweep.scenarios import Before
from chaos.sweep.site import Site, place
from tests.harness import lost_letters
from tests.harness.dead_letters import consuming, holds
from tests.harness.messages import open_channel
from tests.harness.processes import Service
from tests.harness.queues import QUEUE

BODY = {"items": [{"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}]}
FRONT = {"ORDERS_ROLES": "api,relay", "ORDERS_OUTBOX_POLL_SECONDS": "0.1"}  # accepts and publishes, and nothing more
HOUR = "3600"
FAILS_ONCE = {
    "ORDERS_ROLES": "consumer",
    "ORDERS_PARTNER_RETRY_BASE_SECONDS": HOUR,
    "ORDERS_PARTNER_RETRY_CAP_SECONDS": HOUR,
}
PARK = """
    UPDATE outbox SET published_at = NULL, parked_at = clock_timestamp(), attempts = 10, last_error = 'refused'
    WHERE id = $1::text::uuid
"""
WAITS = """
    SELECT attempts > 0 AND lease_owner IS NULL AND next_attempt_at > clock_timestamp()
    FROM sagas WHERE id = $1::text::uuid
"""


async def prepare(site: Site, front: Service, before: Before) -> str:
    """Place an order and bring it into this state; return its id. `front`: a process with FRONT's settings."""
    if before is Before.OLD:
        await _end_orders(site, front)
    order_id = await place_and_publish(site, front)
    async with open_channel(site.broker_url) as channel:
        match before:
            case Before.LOST:
                await _lose(channel)
                await lost_letters.age(site.pool)
            case Before.DEAD:
                await _dead_letter(site, channel)
            case Before.DEAD_LOST:
                await _dead_letter(site, channel)
                await lost_letters.purge_by_hand(channel)
                await lost_letters.age(site.pool)
            case Before.PURGED:
                await _dead_letter(site, channel)
                await site.command(("dlq", "purge"))
            case Before.PARKED:
                await _lose(channel)
                await site.pool.execute(PARK, order_id)
            case Before.WAITING:
                await _fail_once(site, order_id)
            case Before.OLD:
                pass
    return order_id


async def place_and_publish(site: Site, front: Service) -> str:
    """Place an order; its event waits in the queue of the saga's consumer. Return its id."""
    key = site.new_key()
    response = await place(front, key, BODY)
    site.answers.add(key, response)
    order_id: str = response.json()["id"]
    await site.until("SELECT published_at IS NOT NULL FROM outbox WHERE id = $1::text::uuid", order_id)
    return order_id


async def _lose(channel: AbstractChannel) -> None:
    queue = await channel.get_queue(QUEUE, ensure=False)
    await holds(channel, 1, QUEUE)
    await queue.purge()


async def _dead_letter(site: Site, channel: AbstractChannel) -> None:
    async with consuming(site.broker_url, lost_letters.failing_consumer(site.pool)):
        await holds(channel, 1)


async def _fail_once(site: Site, order_id: str) -> None:
    await site.set_faults([{"target": "payment.charge", "kind": "error"}])
    async with site.service("fails-once", FAILS_ONCE):
        await site.until(WAITS, order_id)
    await site.set_faults([])


async def _end_orders(site: Site, front: Service) -> None:
    """Expire the keys of all orders. The last run has left an ended order; the first one needs another."""
    if not await site.pool.fetchval("SELECT EXISTS (SELECT FROM sagas)"):
        await place_and_publish(site, front)
        async with site.recovering():
            pass
    await site.pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    site.pruned |= {str(row["id"]) for row in await site.pool.fetch("SELECT id FROM orders")}

"""How many messages wait in the queue and among the dead letters, as gauges.

RabbitMQ is asked over a connection of its own: the consumer's must not wait for it, and one that publishes may be
blocked by an alarm at the very time when the depths matter most.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from app import db
from app.messaging import outbox_admin
from app.messaging.rabbitmq.transport import CONNECT_SECONDS, DEAD_LETTER_QUEUE, QUEUE, close, connect, unavailable
from app.observability.metrics import Metrics

PERIOD_SECONDS = 5.0

Read = Callable[[], Awaitable[tuple[int, int]]]  # how many wait for the consumer; how many are dead letters


class Depths:
    """Keeps the gauges: as of the last look that succeeded."""

    def __init__(self, read: Read, metrics: Metrics) -> None:
        self._read = read
        self._metrics = metrics

    async def run_once(self) -> int:
        """Look. Returns 0: there is nothing more to do before the next period."""
        waiting, dead = await self._read()
        self._metrics.queue_depth.labels(QUEUE).set(waiting)
        self._metrics.dlq_depth.set(dead)
        return 0


class BrokerDepths:
    """Reads the depths of the queues in RabbitMQ. What a consumer holds unacknowledged is not counted."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None

    async def read(self) -> tuple[int, int]:
        """Ask the broker. Raises BrokerUnavailable, also while a queue is missing."""
        try:
            if self._connection is None:
                self._connection = await connect(self._url, "orders depths")
            async with asyncio.timeout(CONNECT_SECONDS):
                async with self._connection.channel() as channel:
                    queues = [await channel.declare_queue(name, passive=True) for name in (QUEUE, DEAD_LETTER_QUEUE)]
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            await self.close()
            raise unavailable(error) from error
        waiting, dead = (queue.declaration_result.message_count or 0 for queue in queues)
        return waiting, dead

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        await close(connection)


async def read_local(pool: db.Pool, types: Collection[str]) -> tuple[int, int]:
    """Count without a broker: rows of handled types that are pending, and those that were parked."""
    async with db.connection(pool) as conn:
        return await outbox_admin.depths(conn, types)

"""Read how many messages are in a queue and its dead-letter queue.

It uses a connection of its own: consumers must not wait for it, and an alarm may block a publishing connection just
when the depths matter most. Messages that a consumer holds unacknowledged are not counted.
"""

import asyncio

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from app.messaging.rabbitmq.connection import CONNECT_SECONDS, close, connect, unavailable
from app.messaging.topology import QueueSpec


class RabbitQueueDepth:
    """Reads depths, over a connection that it opens when needed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None

    async def read(self, spec: QueueSpec) -> tuple[int, int]:
        """Return the numbers of ready messages and dead letters. Raises BrokerUnavailable, also if one is missing."""
        try:
            if self._connection is None:
                self._connection = await connect(self._url, "orders depths")
            async with asyncio.timeout(CONNECT_SECONDS):
                async with self._connection.channel() as channel:
                    names = (spec.name, spec.dead_letter_queue)
                    declared = [await channel.declare_queue(name, passive=True) for name in names]
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            await self.close()
            raise unavailable(error) from error
        waiting, dead_letters = (queue.declaration_result.message_count or 0 for queue in declared)
        return waiting, dead_letters

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        await close(connection)

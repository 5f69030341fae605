"""The relay's transport to RabbitMQ: publishes batches with confirms.

Publishing and consuming must not share a connection: a resource alarm blocks every connection that publishes. The
connection does not reconnect by itself: its loss raises an error, and the relay's loop decides when to reconnect.
"""

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import cast

import aiormq
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from app.errors import BrokerUnavailable
from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.batch import PublishBatch
from app.messaging.rabbitmq.connection import (
    SETUP_SECONDS,
    AmqpConnection,
    close,
    connect,
    is_blocked,
    unavailable,
    wait_until_unblocked,
)
from app.messaging.rabbitmq.topology import declare_all
from app.messaging.relay import UNCONFIRMED, PublishResult, Refusal
from app.messaging.topology import EXCHANGE, QueueSpec

log = structlog.get_logger(__name__)


class RabbitPublisher:
    """Publishes batches over one channel of one connection, and opens a new one after it was lost."""

    def __init__(self, url: str, queues: Collection[QueueSpec], patience_seconds: float) -> None:
        self._url = url
        self._queues = queues
        self._consumed_types = frozenset(kind for queue in queues for kind in queue.event_types)
        self._patience_seconds = patience_seconds
        self._connection: AmqpConnection | None = None
        self._channel: AbstractChannel | None = None
        self._declared = False

    @property
    def connected(self) -> bool:
        """Whether connection and channel are open, as far as this process knows."""
        if self._connection is None or self._channel is None:
            return False
        return self._connection.connected.is_set() and not self._channel.is_closed

    async def ready(self) -> None:
        """Connect and declare the topology if necessary, and wait while the broker blocks publishing.

        Connecting may take `CONNECT_SECONDS`, the rest `SETUP_SECONDS` (about fifteen round trips).
        """
        await self._open_channel()

    async def _open_channel(self) -> aiormq.Channel:
        try:
            if not self.connected:
                await self._connect()
            await self._wait_until_unblocked()
            if not self._declared:
                await self._declare()
            return cast("aiormq.Channel", await cast("AbstractChannel", self._channel).get_underlay_channel())
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            await self.close()
            raise unavailable(error) from error

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float = math.inf, results: list[PublishResult] | None = None
    ) -> list[PublishResult]:
        """Publish for up to `seconds`. Raises BrokerUnavailable when every message is unconfirmed.

        When no confirm has come for `patience_seconds`, or the time is up, the connection is reset: another relay may
        claim the rows next, so nothing of this batch may be sent later. A blocked connection is kept: the broker
        already has the unread bytes and will read them even after a close, so a new connection would only send it
        another copy. Nothing more is sent on it until it is unblocked.
        """
        started_at = asyncio.get_running_loop().time()
        channel = await self._open_channel()
        results = [UNCONFIRMED] * len(envelopes) if results is None else results
        batch = PublishBatch(channel, EXCHANGE, envelopes, self._consumed_types, self._patience_seconds, results)
        try:
            await batch.publish(started_at, seconds)
        except asyncio.CancelledError:
            await self._reset()
            raise
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            if not (isinstance(error, TimeoutError) and await is_blocked(self._connection)):
                await self._reset()
            unconfirmed = results.count(UNCONFIRMED)
            if unconfirmed == len(envelopes):
                raise unavailable(error) from error
            log.warning("relay.cut_short", unconfirmed=unconfirmed, of=len(envelopes), error=str(unavailable(error)))
        if any(isinstance(result, Refusal) and result.returned for result in results):
            self._declared = False  # a queue or a binding was deleted: declare it before the next batch
        return results

    async def close(self) -> None:
        """Close the connection, if there is one, within a second."""
        connection, self._connection, self._channel = self._connection, None, None
        await close(connection)

    async def _connect(self) -> None:
        await self.close()
        self._connection = await connect(self._url, "orders relay")
        async with asyncio.timeout(SETUP_SECONDS):
            # Without on_return_raises, a message that no queue accepted would look confirmed.
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._declared = False

    async def _wait_until_unblocked(self) -> None:
        if not await is_blocked(self._connection):
            return
        try:
            async with asyncio.timeout(self._patience_seconds):
                await wait_until_unblocked(cast("AbstractConnection", self._connection))
        except TimeoutError:
            text = "the broker blocks publishing: a memory or disk alarm"
            raise BrokerUnavailable(f"rabbitmq: {text}", text) from None

    async def _declare(self) -> None:
        async with asyncio.timeout(SETUP_SECONDS):
            connection, channel = cast("AbstractConnection", self._connection), cast("AbstractChannel", self._channel)
            await declare_all(connection, channel, self._queues)
        self._declared = True

    async def _reset(self) -> None:
        if self._connection is not None:
            self._connection.reset()
        await self.close()

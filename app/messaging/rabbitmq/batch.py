"""Publish one batch to RabbitMQ so that a slow link costs time, but few messages are sent twice.

    first half of the time: send, with at most `WINDOW_BYTES` unconfirmed
    until the time is up:   wait for the confirms of the messages that were sent

A message that was written to the socket may still arrive after an interruption, so every unconfirmed message is sent
again, perhaps as a duplicate. The window limits how many these are, and a batch too large for its time stops sending
early. While confirms arrive, the link works; only `patience_seconds` without a confirm end the batch.
"""

import asyncio
import struct
from collections.abc import Collection, Sequence

import aiormq
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError

from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.connection import ConfirmsLate
from app.messaging.rabbitmq.properties import EventProperties
from app.messaging.relay import UNCONFIRMED, PublishResult, Refusal

# Takes a second at 300 KB/s; allows 640 KB/s with a round trip of 0.4 s. Fits 200 orders with a few lines each.
WINDOW_BYTES = 256 * 1024
HEAD_BYTES = 500  # properties and framing of a message, about
BURST = aiormq.Connection.FRAME_BUFFER_SIZE  # messages passed to aiormq at a time


class PublishBatch:
    """One batch. `results` is filled as confirms and refusals arrive."""

    def __init__(
        self,
        channel: aiormq.Channel,
        exchange: str,
        envelopes: Sequence[Envelope],
        mandatory_types: Collection[str],
        patience_seconds: float,
        results: list[PublishResult],
    ) -> None:
        self.results = results
        self._channel = channel
        self._exchange = exchange
        self._envelopes = envelopes
        self._mandatory_types = mandatory_types
        self._patience_seconds = patience_seconds
        self._unconfirmed_bytes = 0
        self._confirmed = asyncio.Event()
        self._failure: BaseException | None = None  # of the channel or the connection

    async def publish(self, started_at: float, seconds: float) -> None:
        """Send as many messages as time allows, and wait for their confirms. Times are by the event loop's clock.

        Raises ConfirmsLate when no confirm came for `patience_seconds`, or not all came within `seconds`; and what
        aio-pika raises when the connection is lost.

        It does not use the exchange's `publish`, which holds the channel for three iterations of the event loop per
        message: a busy process would need seconds for a batch and mistake that for an outage. A burst that fits into
        aiormq's buffer takes two iterations.
        """
        now, ends_at = asyncio.get_running_loop().time, started_at + seconds
        sent: list[asyncio.Task[None]] = []
        try:
            for index in range(len(self._envelopes)):
                while self._unconfirmed_bytes >= WINDOW_BYTES and self._failure is None:
                    await self._wait_for_confirm(ends_at)
                if self._failure is not None or now() >= started_at + seconds / 2:
                    break
                sent.extend(self._send(index))
                if len(sent) % BURST == 0:
                    await asyncio.sleep(0)  # the tasks run
                    await asyncio.sleep(0)  # the connection's writer runs
            while self._unconfirmed_bytes and self._failure is None:
                await self._wait_for_confirm(ends_at)
        finally:
            for task in sent:
                task.cancel()
        if self._failure is not None:
            raise self._failure
        if not sent and UNCONFIRMED in self.results:
            raise ConfirmsLate("no time was left to send anything")

    def _send(self, index: int) -> list[asyncio.Task[None]]:
        """Start a task that publishes this message. If it cannot be encoded, refuse it and start none."""
        try:
            body, properties = self._envelopes[index].body(), EventProperties(self._envelopes[index])
        except (ValueError, TypeError) as error:
            self.results[index] = _not_encodable(error)
            return []
        self._unconfirmed_bytes += len(body) + HEAD_BYTES
        return [asyncio.create_task(self._publish(index, body, properties))]

    async def _publish(self, index: int, body: bytes, properties: EventProperties) -> None:
        envelope = self._envelopes[index]
        try:
            await self._channel.basic_publish(
                body,
                exchange=self._exchange,
                routing_key=envelope.routing_key,
                properties=properties,
                mandatory=envelope.type in self._mandatory_types,
                wait=False,
            )
            self.results[index] = None
        except PublishError:
            self.results[index] = Refusal(f"returned: no queue is bound for {envelope.routing_key}", returned=True)
        except DeliveryError:
            self.results[index] = Refusal("nacked by the broker")
        except (ValueError, TypeError, struct.error) as error:
            self.results[index] = _not_encodable(error)
        except CONNECTION_EXCEPTIONS as error:
            self._failure = error
        except asyncio.CancelledError:  # by `publish` at its end, or by aiormq, when it drops the connection
            self._failure = ConnectionAbortedError("the connection was closed")
            raise
        finally:
            self._unconfirmed_bytes -= len(body) + HEAD_BYTES
            self._confirmed.set()

    async def _wait_for_confirm(self, ends_at: float) -> None:
        loop = asyncio.get_running_loop()
        self._confirmed.clear()
        try:
            async with asyncio.timeout_at(min(loop.time() + self._patience_seconds, ends_at)):
                await self._confirmed.wait()
        except TimeoutError:
            raise ConfirmsLate("confirms did not arrive in time") from None


def _not_encodable(error: Exception) -> Refusal:
    return Refusal(f"cannot be written: {error}", final=True)

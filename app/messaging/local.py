"""The in-process transport: the broker's place when there is none, behind the relay's own interface.

A row counts as published when its handler's transaction has committed; types without a handler are published at once,
as they would be to an exchange without a queue. A failing handler spends inbox attempts, then the row is parked.
"""

import math
import time
from collections.abc import Sequence

from app.messaging.consumer import Consumer, Dead, Handled, Retry
from app.messaging.envelope import Envelope
from app.messaging.relay import UNCONFIRMED, Answer, Refusal


class LocalTransport:
    """Hands each message to the consumer in the same process."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def ready(self) -> None:
        """There is nothing to connect to."""

    async def publish(self, envelopes: Sequence[Envelope], seconds: float = math.inf) -> list[Answer]:
        """Deliver one after the other, as many as there is time for.

        Raises DatabaseUnavailable; what was handled by then is known to the inbox.
        """
        ends_at = time.monotonic() + seconds
        return [await self._deliver(each) if time.monotonic() < ends_at else UNCONFIRMED for each in envelopes]

    async def _deliver(self, envelope: Envelope) -> Refusal | None:
        if envelope.type not in self._consumer.handlers:
            return None
        match await self._consumer.handle(envelope):
            case Handled():
                return None
            case Retry(reason=reason):
                return Refusal(reason)
            case Dead(reason=reason):
                self._consumer.gave_up()
                return Refusal(reason, final=True)

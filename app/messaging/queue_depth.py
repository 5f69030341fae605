"""Measure how many messages wait in each queue, and how many dead letters it has."""

from collections.abc import Collection

from app.messaging.broker import Broker
from app.messaging.facts import QueueMeasured
from app.messaging.topology import QueueSpec
from app.observability.signals import Signals

PERIOD_SECONDS = 5.0


class QueueDepth:
    """Measures every queue periodically."""

    def __init__(self, broker: Broker, queues: Collection[QueueSpec], signals: Signals) -> None:
        self._broker = broker
        self._queues = queues
        self._signals = signals

    async def run_once(self) -> int:
        """Measure once. Returns 0: there is nothing more to do before the next period. Raises Unavailable."""
        for queue in self._queues:
            waiting, dead_letters = await self._broker.read_depth(queue)
            self._signals.emit(QueueMeasured(queue.name, waiting, dead_letters))
        return 0

"""The consumers of the service: one row each. To add a queue, add a row; nothing else changes.

Topology, relay, operations, metrics and the AsyncAPI document take the queues as an argument.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from app.messaging.consumer import Handler
from app.messaging.topology import QueueSpec
from app.orders import events
from app.saga import start
from app.settings import Settings
from app.values import immutable


@immutable
class ConsumerRow:
    """A queue and the handler of its messages. `handler` makes the handler from the settings."""

    queue: QueueSpec
    handler: Callable[[Settings], Handler]


def _start_saga(settings: Settings) -> Handler:
    hold = settings.inventory_hold_seconds
    return partial(
        start.handle_order_placed,
        deadline_seconds=settings.saga_deadline_seconds,
        hold_seconds=None if hold is None else math.ceil(hold),
    )


CONSUMERS: Sequence[ConsumerRow] = (ConsumerRow(QueueSpec("saga", "orders.saga", (events.PLACED,)), _start_saga),)


def queues(consumers: Sequence[ConsumerRow] = CONSUMERS) -> tuple[QueueSpec, ...]:
    """Return the queues of the consumers."""
    return tuple(row.queue for row in consumers)

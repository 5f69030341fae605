"""What the floors that finish orders share: the four partner calls, the queue and the message."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import aio_pika
from aio_pika.abc import AbstractChannel

QUEUE = "bench.orders"
PLACED, CONFIRMED = "order.placed", "order.confirmed"


@dataclass(frozen=True)
class Line:
    """One line of an order."""

    sku: str
    quantity: int
    unit_price_minor: int


@dataclass(frozen=True)
class Step:
    """One partner call. The partner answers `status`."""

    name: str
    path: str
    status: int


STEPS = (
    Step("reserve_inventory", "/v1/inventory/hold", 201),
    Step("charge_payment", "/v1/payments/charge", 201),
    Step("commit_inventory", "/v1/inventory/commit", 200),
    Step("create_shipment", "/v1/shipments", 201),
)


def body(step: Step, order_id: UUID, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the body of a call."""
    saga = {"saga_id": str(order_id)}
    items = [{"item_id": line.sku, "qty": line.quantity} for line in lines]
    match step.name:
        case "reserve_inventory":
            return {**saga, "items": items, "ttl_seconds": 1200}
        case "charge_payment":
            total = sum(line.quantity * line.unit_price_minor for line in lines)
            return {**saga, "amount_minor": total, "currency": "USD", "payment_method": None}
        case "create_shipment":
            return {**saga, "items": items, "address": None}
        case _:
            return saga


def key(step: Step, order_id: UUID) -> str:
    """Return the key of a call."""
    return f"{order_id}:{step.name}"


async def declare(channel: AbstractChannel) -> None:
    """Declare the queue: durable and replicated, as the service's."""
    await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})


def message(content: bytes, type_: str) -> aio_pika.Message:
    """Return a message that outlives the broker."""
    return aio_pika.Message(
        content,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=str(uuid4()),
        type=type_,
        content_type="application/json",
    )

"""The four partner calls that each contender makes for an order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID


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


def body(step: Step, order_id: UUID | str, lines: Sequence[Line]) -> dict[str, Any]:
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


def key(step: Step, order_id: UUID | str) -> str:
    """Return the key of a call."""
    return f"{order_id}:{step.name}"

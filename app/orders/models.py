"""An order as the rest of the code sees it: immutable values, money in minor units."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from app.orders import money
from app.orders.status import Reason, Status


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an order."""

    sku: str
    quantity: int
    unit_price_minor: int

    @property
    def total_minor(self) -> int:
        """Price of the whole line."""
        return self.quantity * self.unit_price_minor


@dataclass(frozen=True, slots=True)
class Order:
    """An order. `version` counts its changes from 1; the events it emits carry it as their sequence."""

    id: UUID
    tenant: str
    status: Status
    status_reason: Reason | None
    customer_id: str | None
    currency: str
    lines: tuple[Line, ...]
    payment_method: str | None
    shipping_address: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    tracking_id: str | None
    version: int
    placed_at: datetime
    updated_at: datetime
    cancel_requested_at: datetime | None = None  # of an order whose saga runs: it must turn back
    cancel_reason: Reason | None = None  # who asked for that

    @property
    def total_minor(self) -> int:
        """What the customer pays."""
        return sum(line.total_minor for line in self.lines)

    def representation(self) -> dict[str, Any]:
        """Return the order as the outside sees it, in answers and in events alike."""
        return {
            "id": str(self.id),
            "status": self.status,
            "status_reason": self.status_reason,
            "customer_id": self.customer_id,
            "currency": self.currency,
            "items": [
                {
                    "sku": line.sku,
                    "quantity": line.quantity,
                    "unit_price": money.from_minor(line.unit_price_minor, self.currency),
                    "line_total": money.from_minor(line.total_minor, self.currency),
                }
                for line in self.lines
            ],
            "total": money.from_minor(self.total_minor, self.currency),
            "placed_at": rfc3339(self.placed_at),
            "updated_at": rfc3339(self.updated_at),
            "version": self.version,
            "tracking_id": self.tracking_id,
        }


def rfc3339(instant: datetime) -> str:
    """Format as UTC with microseconds: 2026-11-21T03:47:27.123456Z."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

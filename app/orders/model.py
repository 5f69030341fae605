"""An order: its status and reasons, the transitions between them, and its immutable values. Money is in minor units."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.orders import money
from app.values import immutable

JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `json.dumps` would make one for each order


class Status(StrEnum):
    """The status of an order. It becomes REJECTED or CANCELLED only after everything is undone."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    COMPENSATING = "compensating"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """Why an order did not become, or will not become, confirmed."""

    OUT_OF_STOCK = "out-of-stock"
    CARD_DECLINED = "card-declined"
    UNDELIVERABLE = "undeliverable"
    HOLD_EXPIRED = "hold-expired"
    TIMED_OUT = "timed-out"
    CANCELLED_BY_CUSTOMER = "cancelled-by-customer"
    COMPENSATED_BY_OPERATOR = "compensated-by-operator"

    @classmethod
    def _missing_(cls, value: object) -> "Reason | None":
        """Accept reasons of a newer release, which runs beside this one during a rollout.

        Either release can compensate such a saga; its order ends rejected.
        """
        if not isinstance(value, str):
            return None
        reason = str.__new__(cls, value)
        reason._name_, reason._value_ = "UNKNOWN", value
        return reason


TRANSITIONS: dict[Status, frozenset[Status]] = {
    # Straight to CANCELLED only while there is no saga: then there is nothing to undo.
    Status.PENDING: frozenset({Status.CONFIRMED, Status.COMPENSATING, Status.CANCELLED}),
    Status.COMPENSATING: frozenset({Status.REJECTED, Status.CANCELLED}),
    Status.CONFIRMED: frozenset(),
    Status.REJECTED: frozenset(),
    Status.CANCELLED: frozenset(),
}

FINAL = frozenset(status for status, following in TRANSITIONS.items() if not following)
UNFINISHED = tuple(sorted(set(Status) - FINAL))


def may_become(present: Status, following: Status) -> bool:
    """Return whether `present` → `following` is one of the transitions above."""
    return following in TRANSITIONS[present]


@immutable
class Line:
    """One line of an order."""

    sku: str
    quantity: int
    unit_price_minor: int

    @property
    def total_minor(self) -> int:
        """The price of the whole line."""
        return self.quantity * self.unit_price_minor


@dataclass(frozen=True)
class Order:
    """An order. `version` counts its changes from 1, and is the sequence of its events."""

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
    cancel_requested_at: datetime | None = None  # the running saga must compensate
    cancel_reason: Reason | None = None  # who requested it

    @property
    def total_minor(self) -> int:
        """What the customer pays."""
        return sum(line.total_minor for line in self.lines)

    @functools.cached_property
    def json(self) -> str:
        """The public form as JSON text: the same in every response, and in the event of this version."""
        return JSON.encode(self.representation())

    def representation(self) -> dict[str, Any]:
        """Return the public form of the order, for responses and events."""
        placed_at = rfc3339(self.placed_at)
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
            "placed_at": placed_at,
            "updated_at": placed_at if self.updated_at is self.placed_at else rfc3339(self.updated_at),
            "version": self.version,
            "tracking_id": self.tracking_id,
        }


def rfc3339(instant: datetime) -> str:
    """Format as UTC with microseconds: 2026-11-21T03:47:27.123456Z."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

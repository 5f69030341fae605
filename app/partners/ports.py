"""What the saga asks of its partners, and the four things a call can come to.

A partner call never raises for what the partner did: it returns an `Outcome`. The difference that matters is between
*not sent* (the partner cannot have acted) and *unknown* (it may have): everything but a clear answer is unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Done:
    """The partner confirmed; `reply` is its validated answer (`reservation_id`, `payment_id`, `tracking_id`, …)."""

    reply: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """The partner said no for good; `code` is the stable reason (`out-of-stock`, `card-declined`, …)."""

    code: str


@dataclass(frozen=True, slots=True)
class NotSent:
    """The request never reached the partner (no connection): it cannot have acted on it."""

    detail: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The partner may or may not have acted: a timeout, a reset, or any answer other than the agreed ones.

    `retry_after_seconds` is the partner's own wish, if it stated one. `our_fault` is true for 401, 403 and 422: the
    request itself was wrong, which is a defect of this service or of its configuration and must alert.
    """

    detail: str
    retry_after_seconds: float | None = None
    our_fault: bool = False


Outcome = Done | Refused | NotSent | Unknown


@dataclass(frozen=True, slots=True)
class Item:
    """One line of an order as partners see it."""

    sku: str
    quantity: int


class Inventory(Protocol):
    """Holds stock for a saga, turns the hold into a sale, or takes everything back."""

    async def hold(self, saga_id: UUID, items: Sequence[Item]) -> Outcome:
        """Reserve all items or none. Refused: `out-of-stock`. Reply: `reservation_id`."""

    async def commit(self, saga_id: UUID) -> Outcome:
        """Turn the hold into a sale. Refused: `hold-expired`."""

    async def release(self, saga_id: UUID) -> Outcome:
        """Return whatever is held or sold for the saga, and block any later hold or commit."""


class Payment(Protocol):
    """Charges a customer's payment method once per saga, or gives the money back."""

    async def charge(self, saga_id: UUID, amount_minor: int, currency: str, payment_method: str | None) -> Outcome:
        """Charge `amount_minor` of `currency` (ISO 4217). Refused: `card-declined`. Reply: `payment_id`."""

    async def refund(self, saga_id: UUID) -> Outcome:
        """Give back whatever was charged for the saga, and block any later charge."""


class Shipping(Protocol):
    """Creates a shipment once per saga, or cancels it."""

    async def create(self, saga_id: UUID, items: Sequence[Item], address: Mapping[str, Any] | None) -> Outcome:
        """Hand the parcel over. Refused: `undeliverable`. Reply: `tracking_id`."""

    async def cancel(self, saga_id: UUID) -> Outcome:
        """Cancel whatever was created for the saga, and block any later shipment."""

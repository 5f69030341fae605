"""The ports of the partners, and the four outcomes of a call.

A call never raises because of what the partner did: it returns an `Outcome`. The important difference is between *not
sent* (the partner cannot have acted) and *unknown* (it may have acted). Everything except a clear answer is unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

from app.values import immutable


@immutable
class Done:
    """The partner confirmed. `reply` is its validated answer (`reservation_id`, `payment_id`, `tracking_id`, …)."""

    reply: Mapping[str, Any] = field(default_factory=dict)


@immutable
class Refused:
    """The partner refused, and will refuse again. `code` is the stable reason (`out-of-stock`, `card-declined`, …)."""

    code: str


@immutable
class NotSent:
    """The request never reached the partner (no connection), so the partner cannot have acted."""

    detail: str


class PartnerHealth(StrEnum):
    """What an unclear outcome says about the partner itself."""

    FAILING = "failing"  # no answer, or a temporary error (5xx, 408, 425, 429)
    BROKEN = "broken"  # an answer that reports success but breaks the contract
    WORKING = "working"  # a deliberate answer, such as "wrong request" or "not yet"


@immutable
class Unknown:
    """The partner may or may not have acted: a timeout, a reset, or any answer other than the agreed ones.

    `retry_after_seconds`: from the partner's Retry-After. `our_fault`: the request itself was wrong, due to a defect of
    this service or of its configuration (4xx, except 409 and temporary errors). `health` is about the partner, not
    about the order, so outcomes that differ only in it are equal.
    """

    detail: str
    retry_after_seconds: float | None = None
    our_fault: bool = False
    health: PartnerHealth = field(default=PartnerHealth.FAILING, compare=False)

    @property
    def alarming(self) -> bool:
        """Return whether an operator must look at it: a defect, ours or the partner's, that retrying cannot fix."""
        return self.our_fault or self.health is PartnerHealth.BROKEN


Outcome = Done | Refused | NotSent | Unknown
OUTCOMES = ("done", "refused", "not-sent", "unknown")  # their names in logs and metrics


@immutable
class PartnerItem:
    """One line of an order as partners see it."""

    sku: str
    quantity: int


@immutable
class ChargeRequest:
    """The money of a saga: an amount in the smallest unit of ISO 4217, to be charged once and, if necessary, refunded.

    `started_at`: when the saga started; no charge of it is older. Some providers forget keys after a time.
    `payment_id`: the provider's id of the charge, if its answer was recorded; only the refund needs it.
    """

    saga_id: UUID
    amount_minor: int
    currency: str
    payment_method: str | None
    started_at: datetime
    payment_id: str | None = None


class Inventory(Protocol):
    """Holds stock for a saga, turns the hold into a sale, or releases it."""

    async def hold(self, saga_id: UUID, items: Sequence[PartnerItem], seconds: int) -> Outcome:
        """Reserve all items or none. Refused: `out-of-stock`. Reply: `reservation_id`."""

    async def commit(self, saga_id: UUID) -> Outcome:
        """Turn the hold into a sale. Refused: `hold-expired`."""

    async def release(self, saga_id: UUID) -> Outcome:
        """Return what is held or sold for the saga, if anything, and block any later hold or commit."""


class Payment(Protocol):
    """Charges a customer's payment method once per saga, or refunds it."""

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Charge the amount. Refused: `card-declined`. Reply: `payment_id`."""

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Refund what was charged for the saga, if anything, and block any later charge."""


class Shipping(Protocol):
    """Creates a shipment once per saga, or cancels it."""

    async def create(self, saga_id: UUID, items: Sequence[PartnerItem], address: Mapping[str, Any] | None) -> Outcome:
        """Hand the parcel over. Refused: `undeliverable`. Reply: `tracking_id`."""

    async def cancel(self, saga_id: UUID) -> Outcome:
        """Cancel the shipment of the saga, if there is one, and block any later shipment."""


class InventoryQuery(Protocol):
    """Shows what the inventory partner has for a saga. `verify` reads it; a saga never depends on it."""

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """Return `held`, `committed`, `released` or `expired`; None if it was never seen (a call may be in flight)."""


class PaymentQuery(Protocol):
    """Shows what the payment partner has for a saga."""

    async def state_of(self, charge: ChargeRequest) -> str | Unknown | None:
        """Return `charged`, `declined` or `refunded`; None if it was never seen (a call may be in flight)."""


class ShippingQuery(Protocol):
    """Shows what the shipping partner has for a saga."""

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """Return `created`, `refused` or `cancelled`; None if it was never seen (a call may be in flight)."""


@immutable
class PartnerPorts:
    """The partners that the saga's steps call."""

    inventory: Inventory
    payment: Payment
    shipping: Shipping

"""What the saga asks of its partners, and the four things a call can come to.

A partner call never raises for what the partner did: it returns an `Outcome`. The difference that matters is between
*not sent* (the partner cannot have acted) and *unknown* (it may have): everything but a clear answer is unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
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


class PartnerHealth(StrEnum):
    """What an unclear outcome tells of the partner itself."""

    FAILING = "failing"  # no answer, or one that says: not now (5xx, 408, 425, 429)
    BROKEN = "broken"  # an answer of success that is none we agreed on
    WORKING = "working"  # an answer that it means: to this request, no; or: not yet


@dataclass(frozen=True, slots=True)
class Unknown:
    """The partner may or may not have acted: a timeout, a reset, or any answer other than the agreed ones.

    `retry_after_seconds` is the partner's own wish, if it stated one. `our_fault`: the request itself was wrong, which
    is a defect of this service or of its configuration (4xx, but for 409 and those that say: not now). `health` is
    about the partner and not about the order, so it makes no other outcome.
    """

    detail: str
    retry_after_seconds: float | None = None
    our_fault: bool = False
    health: PartnerHealth = field(default=PartnerHealth.FAILING, compare=False)

    @property
    def alarming(self) -> bool:
        """Whether a person must look at it: a defect, ours or the partner's, that no retry mends."""
        return self.our_fault or self.health is PartnerHealth.BROKEN


Outcome = Done | Refused | NotSent | Unknown
OUTCOMES = ("done", "refused", "not-sent", "unknown")  # their names in logs and metrics


@dataclass(frozen=True, slots=True)
class PartnerItem:
    """One line of an order as partners see it."""

    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """The money of a saga: an amount in ISO 4217's smallest unit, to be charged once and, if need be, given back.

    `started_at` is when the saga started: no charge of it is older. Some providers forget keys after a time.
    `payment_id` is what the provider called the charge, if its answer is on record; for the refund alone.
    """

    saga_id: UUID
    amount_minor: int
    currency: str
    payment_method: str | None
    started_at: datetime
    payment_id: str | None = None


class Inventory(Protocol):
    """Holds stock for a saga, turns the hold into a sale, or takes everything back."""

    async def hold(self, saga_id: UUID, items: Sequence[PartnerItem], seconds: int) -> Outcome:
        """Reserve all items or none. Refused: `out-of-stock`. Reply: `reservation_id`."""

    async def commit(self, saga_id: UUID) -> Outcome:
        """Turn the hold into a sale. Refused: `hold-expired`."""

    async def release(self, saga_id: UUID) -> Outcome:
        """Return whatever is held or sold for the saga, and block any later hold or commit."""


class Payment(Protocol):
    """Charges a customer's payment method once per saga, or gives the money back."""

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Charge the amount. Refused: `card-declined`. Reply: `payment_id`."""

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Give back whatever was charged for the saga, and block any later charge."""


class Shipping(Protocol):
    """Creates a shipment once per saga, or cancels it."""

    async def create(self, saga_id: UUID, items: Sequence[PartnerItem], address: Mapping[str, Any] | None) -> Outcome:
        """Hand the parcel over. Refused: `undeliverable`. Reply: `tracking_id`."""

    async def cancel(self, saga_id: UUID) -> Outcome:
        """Cancel whatever was created for the saga, and block any later shipment."""


@dataclass(frozen=True, slots=True)
class PartnerPorts:
    """The partners that the saga's steps call."""

    inventory: Inventory
    payment: Payment
    shipping: Shipping

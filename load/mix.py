"""What a run orders, and how its clients behave. Both follow from the seed and the order's number."""

import enum
import random
from dataclasses import dataclass
from typing import Any

CURRENCY = "USD"  # two decimals, so a minor unit is a cent
ITEMS = 8  # the number of items with a stock of their own; a new item of the sandbox has 1,000,000


class Kind(enum.StrEnum):
    """What happens to an order at the partners."""

    PLAIN = "plain"
    OUT_OF_STOCK = "out-of-stock"
    CARD_DECLINED = "card-declined"
    UNDELIVERABLE = "undeliverable"
    CHARGE_UNANSWERED = "charge-unanswered"


class Behaviour(enum.StrEnum):
    """What a client does with one key, besides retrying when it gets no 201."""

    PATIENT = "patient"
    HANGS_UP = "hangs-up"  # disconnects after a few milliseconds, then sends again
    SENDS_TWICE = "sends-twice"  # two requests at the same time
    REPEATS = "repeats"  # sends again after the 201


KINDS = {
    Kind.PLAIN: 900,
    Kind.OUT_OF_STOCK: 30,
    Kind.CARD_DECLINED: 40,
    Kind.UNDELIVERABLE: 20,
    Kind.CHARGE_UNANSWERED: 10,
}
BEHAVIOURS = {
    Behaviour.PATIENT: 75,
    Behaviour.HANGS_UP: 10,
    Behaviour.SENDS_TWICE: 5,
    Behaviour.REPEATS: 10,
}


@dataclass(frozen=True, slots=True)
class PlannedOrder:
    """One key of the run, with its request. `customer` occurs in no other order, so it names the key in listings."""

    number: int
    key: str
    customer: str
    kind: Kind
    behaviour: Behaviour
    sku: str
    quantity: int
    price_minor: int
    hangs_up_after_seconds: float

    @property
    def total_minor(self) -> int:
        """Return what is to be charged, in the currency's smallest unit."""
        return self.quantity * self.price_minor

    def body(self) -> dict[str, Any]:
        """Return the JSON of the request."""
        item = {
            "sku": self.sku,
            "quantity": self.quantity,
            "unit_price": f"{self.price_minor // 100}.{self.price_minor % 100:02}",
        }
        methods = {Kind.CARD_DECLINED: "pm_card_declined", Kind.CHARGE_UNANSWERED: "pm_timeout_after"}
        return {
            "customer_id": self.customer,
            "currency": CURRENCY,
            "items": [item],
            "payment_method": methods.get(self.kind, "pm_card_visa"),
        }


@dataclass(frozen=True, slots=True)
class OrderMix:
    """The orders of one run. `run_id` is a part of every key, customer and item, so that runs do not meet."""

    run_id: str
    seed: int

    @property
    def customer_prefix(self) -> str:
        """Return what the customers of this run, and of no other, start with."""
        return f"load-{self.run_id}-"

    def items(self) -> list[str]:
        """Return the items that only this run orders."""
        return [f"LOAD-{self.run_id}-{number}" for number in range(ITEMS)]

    def order(self, number: int) -> PlannedOrder:
        """Return order `number` of the run."""
        rng = random.Random(f"{self.seed}/{number}")  # noqa: S311 - a reproducible mix needs no secrecy
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        magic = {Kind.OUT_OF_STOCK: "OUT-OF-STOCK", Kind.UNDELIVERABLE: "UNDELIVERABLE"}
        return PlannedOrder(
            number=number,
            key=f"load-{self.run_id}-{number}",
            customer=f"{self.customer_prefix}{number}",
            kind=kind,
            behaviour=rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0],
            sku=magic.get(kind, f"LOAD-{self.run_id}-{number % ITEMS}"),
            quantity=rng.randint(1, 5),
            price_minor=rng.randint(100, 9999),
            hangs_up_after_seconds=rng.uniform(0.0005, 0.03),
        )

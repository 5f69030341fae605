"""The order's status and the reasons for it, as data: which transitions there are, and nothing else."""

from enum import StrEnum


class Status(StrEnum):
    """Where an order is. REJECTED and CANCELLED are only ever reached when everything is undone."""

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
        """Keep as it is what was written by a newer release, which runs beside this one during a rollout.

        A saga that turned for it is undone by either, and ends rejected.
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


def may_become(present: Status, following: Status) -> bool:
    """Tell whether `present` → `following` is one of the transitions above."""
    return following in TRANSITIONS[present]

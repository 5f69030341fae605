"""The steps of the saga: one row per step, with its partner, its do, its undo and its refusals.

Everything that depends on the steps is derived from these rows: the order of calls (`plan`), the calls themselves
(`gateway`), circuits, metric labels, crash points and the tests that sweep over them.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from app.orders.model import Order, Reason
from app.partners.ports import ChargeRequest, Outcome, PartnerItem, PartnerPorts
from app.values import immutable


class Step(StrEnum):
    """The names of the steps. They are stored and are part of partners' idempotency keys, so they never change."""

    RESERVE_INVENTORY = "reserve_inventory"
    CHARGE_PAYMENT = "charge_payment"
    COMMIT_INVENTORY = "commit_inventory"
    CREATE_SHIPMENT = "create_shipment"


class Action(StrEnum):
    """What the saga asks a partner to do about a step."""

    DO = "do"
    UNDO = "undo"


@immutable
class StepRequest:
    """The input of a call: the order, and values from the saga's row and log. It is the same for every attempt.

    `do_reply`: the recorded reply of the step's do, for an undo that reads it; None if no reply was recorded.
    """

    order: Order
    started_at: datetime
    hold_seconds: int
    do_reply: Mapping[str, Any] | None = None

    @property
    def items(self) -> list[PartnerItem]:
        """Return the order's lines as partners see them."""
        return [PartnerItem(line.sku, line.quantity) for line in self.order.lines]

    @property
    def charge(self) -> ChargeRequest:
        """Return the order's money as the payment partner sees it."""
        order, reply = self.order, self.do_reply or {}
        return ChargeRequest(
            order.id, order.total_minor, order.currency, order.payment_method, self.started_at, reply.get("payment_id")
        )


StepCall = Callable[[PartnerPorts, StepRequest], Awaitable[Outcome]]


@immutable
class StepSpec:
    """One step of a plan.

    `step`: its name. `partner`: whose circuits guard its calls. `refusals`: the codes that make the saga compensate;
    any other refusal is retried. `undo` is None if the undo of the earlier step `compensated_by` reverts this one too.
    `undo_reads_reply`: the undo gets the recorded reply of the do.
    """

    step: str
    partner: str
    do: StepCall
    undo: StepCall | None
    refusals: frozenset[Reason]
    compensated_by: str | None = None
    undo_reads_reply: bool = False

    def __post_init__(self) -> None:
        if (self.undo is None) is (self.compensated_by is None):
            raise ValueError(f"{self.step} needs either an undo or the earlier step that compensates it")

    def calls(self) -> Mapping[Action, StepCall]:
        """Return the calls that the saga makes for this step."""
        return {Action.DO: self.do} | ({} if self.undo is None else {Action.UNDO: self.undo})


Plans = Mapping[int, tuple[StepSpec, ...]]

# A saga stores the version of its plan and keeps it to its end, so a released plan never changes: add a new version.
# The last step is the one that commits to the customer: the record of its success also confirms the order.
PLANS: Plans = {
    1: (
        StepSpec(
            step=Step.RESERVE_INVENTORY,
            partner="inventory",
            do=lambda ports, request: ports.inventory.hold(request.order.id, request.items, request.hold_seconds),
            undo=lambda ports, request: ports.inventory.release(request.order.id),
            refusals=frozenset({Reason.OUT_OF_STOCK}),
        ),
        StepSpec(
            step=Step.CHARGE_PAYMENT,
            partner="payment",
            do=lambda ports, request: ports.payment.charge(request.charge),
            undo=lambda ports, request: ports.payment.refund(request.charge),
            refusals=frozenset({Reason.CARD_DECLINED}),
            undo_reads_reply=True,
        ),
        StepSpec(
            step=Step.COMMIT_INVENTORY,
            partner="inventory",
            do=lambda ports, request: ports.inventory.commit(request.order.id),
            undo=None,
            refusals=frozenset({Reason.HOLD_EXPIRED}),
            compensated_by=Step.RESERVE_INVENTORY,
        ),
        StepSpec(
            step=Step.CREATE_SHIPMENT,
            partner="shipping",
            do=lambda ports, request: ports.shipping.create(
                request.order.id, request.items, request.order.shipping_address
            ),
            undo=lambda ports, request: ports.shipping.cancel(request.order.id),
            refusals=frozenset({Reason.UNDELIVERABLE}),
        ),
    ),
}
NEWEST = 1  # new sagas start with it; raise it one release after its plan was added


def specs(plans: Plans = PLANS) -> list[StepSpec]:
    """Return the rows of all plans, the oldest plan first. A step has a row in each plan that contains it."""
    return [spec for version in sorted(plans) for spec in plans[version]]


def partners(plans: Plans = PLANS) -> list[str]:
    """Return the names of the partners, each once, in the order of the steps."""
    return list(dict.fromkeys(spec.partner for spec in specs(plans)))

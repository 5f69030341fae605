"""Payment: charge a saga at most once, and refund the charge at most once."""

import sqlite3
from typing import Annotated
from uuid import uuid4

from pydantic import Field

from sandbox.calls import Body, Operation, PartnerCall, PartnerDecision, refuse

CHARGE = Operation("payment.charge", "charge_payment", "charge_payment:undo", (402, "card-declined"))
REFUND = Operation("payment.refund", "charge_payment:undo")

DECLINED_METHOD = "pm_card_declined"
SILENT_METHOD = "pm_timeout_after"


class Charge(Body):
    """An amount in the currency's smallest unit. A null method means the customer's default method."""

    amount_minor: Annotated[int, Field(gt=0, lt=10**15)]
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    payment_method: Annotated[str | None, Field(max_length=200)] = None


def charge(db: sqlite3.Connection, call: PartnerCall[Charge]) -> PartnerDecision:
    """Charge the amount. With `pm_timeout_after`, only a retry gets the answer."""
    body = call.body
    declined = call.refuse or body.payment_method == DECLINED_METHOD
    state = "declined" if declined else "charged"
    db.execute("INSERT INTO payments VALUES (?, ?, ?)", (body.saga_id, state, body.amount_minor))
    if declined:
        return refuse(call.operation)
    return PartnerDecision(
        "done",
        201,
        {"payment_id": f"pay_{uuid4().hex}"},
        applied=True,
        amount_minor=body.amount_minor,
        silent=body.payment_method == SILENT_METHOD,
    )


def refund(db: sqlite3.Connection, call: PartnerCall[Body]) -> PartnerDecision:
    """Refund the charge, if any. A declined payment stays `declined`, because no money moved."""
    saga_id = call.body.saga_id
    charged = db.execute(
        "UPDATE payments SET state = 'refunded' WHERE saga_id = ? AND state = 'charged' RETURNING amount_minor",
        (saga_id,),
    ).fetchone()
    db.execute("INSERT INTO payments VALUES (?, 'refunded', 0) ON CONFLICT DO NOTHING", (saga_id,))
    answer = {"saga_id": saga_id, "state": state_of(db, saga_id)}
    if charged is None:
        return PartnerDecision("nothing-to-undo", 200, answer)
    return PartnerDecision("done", 200, answer, applied=True, amount_minor=charged["amount_minor"])


def state_of(db: sqlite3.Connection, saga_id: str) -> str | None:
    """Return `charged`, `declined`, `refunded` (also if nothing was charged before), or None if unknown."""
    row = db.execute("SELECT state FROM payments WHERE saga_id = ?", (saga_id,)).fetchone()
    return None if row is None else str(row["state"])

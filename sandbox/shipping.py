"""Shipping: create a saga's shipment at most once, and cancel it at most once."""

import sqlite3
from typing import Annotated
from uuid import uuid4

from pydantic import Field, JsonValue

from sandbox.calls import Body, Line, Operation, PartnerCall, PartnerDecision, refuse

CREATE = Operation("shipping.create", "create_shipment", "create_shipment:undo", (409, "undeliverable"))
CANCEL = Operation("shipping.cancel", "create_shipment:undo")

UNDELIVERABLE_ITEM = "UNDELIVERABLE"


class Shipment(Body):
    """The items and the address. A null address means the customer's own, which the carrier knows."""

    items: Annotated[list[Line], Field(min_length=1, max_length=1000)]
    address: dict[str, JsonValue] | None = None


def create(db: sqlite3.Connection, call: PartnerCall[Shipment]) -> PartnerDecision:
    """Create the shipment."""
    refused = call.refuse or any(line.item_id == UNDELIVERABLE_ITEM for line in call.body.items)
    state = "refused" if refused else "created"
    db.execute("INSERT INTO shipments VALUES (?, ?)", (call.body.saga_id, state))
    if refused:
        return refuse(call.operation)
    return PartnerDecision("done", 201, {"tracking_id": f"trk_{uuid4().hex}"}, applied=True)


def cancel(db: sqlite3.Connection, call: PartnerCall[Body]) -> PartnerDecision:
    """Cancel the shipment, if any. A refused shipment stays `refused`, because the carrier has no parcel."""
    saga_id = call.body.saga_id
    statement = "UPDATE shipments SET state = 'cancelled' WHERE saga_id = ? AND state = 'created'"
    cancelled = db.execute(statement, (saga_id,)).rowcount == 1
    db.execute("INSERT INTO shipments VALUES (?, 'cancelled') ON CONFLICT DO NOTHING", (saga_id,))
    answer = {"saga_id": saga_id, "state": state_of(db, saga_id)}
    return PartnerDecision("done" if cancelled else "nothing-to-undo", 200, answer, applied=cancelled)


def state_of(db: sqlite3.Connection, saga_id: str) -> str | None:
    """Return `created`, `refused`, `cancelled` (also if nothing was created before), or None if unknown."""
    row = db.execute("SELECT state FROM shipments WHERE saga_id = ?", (saga_id,)).fetchone()
    return None if row is None else str(row["state"])
